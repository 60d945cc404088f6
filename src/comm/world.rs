//! The ranks of this run and the two planes they talk over.

use super::{Communicator, Solo};
use std::rc::Rc;

/// Which transport joins the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// By the launcher that is found in the environment.
    Auto,
    /// One rank, no peers.
    Solo,
    /// MPI, by mpirun or `srun --mpi=pmix`.
    Mpi,
}

/// The ranks of this run.
#[derive(Clone)]
pub struct World {
    /// Gradients and parameters.
    pub device: Rc<dyn Communicator>,
    /// Rewards, metrics, digests and flags.
    pub host: Rc<dyn Communicator>,
}

impl World {
    /// One rank alone.
    pub fn solo() -> Self {
        let comm = Rc::new(Solo);
        Self { device: comm.clone(), host: comm }
    }

    /// This rank, `0..world_size`.
    pub fn rank(&self) -> usize {
        self.host.rank()
    }

    /// Number of ranks R.
    pub fn world_size(&self) -> usize {
        self.host.world_size()
    }
}
