//! Collectives between ranks: one trait, one file per transport.
//!
//! The order of collective calls is the same on every rank because it depends on the plan only, never on local data.
//! Two planes share the trait: `device` carries gradients and parameters, `host` carries rewards, metrics and flags.

mod answers;
mod background;
mod bootstrap;
mod call;
mod choice;
mod cores;
mod counted;
mod job;
mod launcher;
mod message;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;
mod place;
mod plane;
mod solo;
mod tcp;
#[doc(hidden)]
pub mod testing;
mod thread;
mod transport;
mod watch;
mod world;

pub use self::call::{Call, Pending};
pub use self::choice::Backend;
pub use self::cores::{binding_advice, threads_per_rank};
pub use self::message::{agreed, exchange};
#[cfg(feature = "mpi")]
pub use self::mpi::{Mpi, Session as MpiSession};
#[cfg(feature = "cuda")]
pub use self::nccl::{ID_BYTES as NCCL_ID_BYTES, Membership as NcclMembership, Nccl};
pub use self::place::Place;
pub use self::solo::Solo;
pub use self::thread::ThreadGroup;
pub use self::watch::phase;
pub use self::world::{Launch, World};

use crate::error::Result;
use candle_core::{DType, Device, Tensor};

/// This rank by the launcher's word, before any transport is there; 0 where it tells nothing.
pub fn launched_rank() -> usize {
    launcher::detect(&launcher::environment()).ok().flatten().map_or(0, |launcher| launcher.rank)
}

/// Number of ranks by the launcher's word, before any transport is there, where it tells; 1 without a launcher.
///
/// # Errors
/// [`crate::Error::Usage`] where the launcher's variables do not say who this rank is.
pub fn launched_ranks() -> Result<Option<usize>> {
    Ok(launcher::detect(&launcher::environment())?.map_or(Some(1), |launcher| launcher.started()))
}

/// Whether other ranks wait for this one should it end before it meets them. mpirun ends them all.
pub fn peers_wait() -> bool {
    let launcher = launcher::detect(&launcher::environment()).ok().flatten();
    launcher.is_some_and(|launcher| launcher.started() != Some(1) && launcher.name != launcher::MPIRUN)
}

/// How the values of the ranks are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// Sum over ranks.
    Sum,
    /// Largest over ranks; a NaN of any rank wins, so that it reaches every rank.
    Max,
}

/// Collectives on one-dimensional tensors of f32, bf16, f64, u32 or u8, the same length and type on every rank.
///
/// bf16 is reduced in f32 and rounded once. A result lies on the device of the argument, shares no memory with it and
/// records no graph. No call waits for ever: a peer that is gone or hangs ends in [`crate::Error::Peer`] or in the end
/// of the whole job. A tensor of another type or shape, a `root` that is no rank, or a length that R must divide and
/// does not is [`crate::Error::Failed`], on every rank alike.
pub trait Communicator {
    /// This rank, `0..world_size`.
    fn rank(&self) -> usize;
    /// Number of ranks R.
    fn world_size(&self) -> usize;
    /// The result of a collective call.
    fn call(&self, call: Call, tensor: &Tensor) -> Result<Tensor>;
    /// Ends all ranks at once, the process with `code`.
    fn abort(&self, code: i32) -> !;

    /// Begins a call, whose result is waited for later; the tensor may change meanwhile. Calls end in the order of their
    /// beginning. Where a communicator cannot work beside its caller, the call has ended when this returns.
    fn begin(&self, call: Call, tensor: &Tensor) -> Result<Pending> {
        Ok(Pending::ready(self.call(call, tensor)?))
    }
    /// Returns when every rank has called it.
    fn barrier(&self) -> Result<()> {
        self.call(Call::Barrier, &Tensor::zeros(0, DType::U8, &Device::Cpu)?).map(drop)
    }
    /// The tensor of rank `root`, `[S]` on every rank (the others pass one of the same length and type).
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Tensor> {
        self.call(Call::Broadcast { root }, tensor)
    }
    /// Elementwise over ranks, `[S] -> [S]`.
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Tensor> {
        self.call(Call::AllReduce(op), tensor)
    }
    /// All ranks' tensors one after the other, `[S] -> [R*S]`.
    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        self.call(Call::AllGather, tensor)
    }
    /// This rank's part of the elementwise reduction, `[R*S] -> [S]`.
    fn reduce_scatter(&self, tensor: &Tensor, op: ReduceOp) -> Result<Tensor> {
        self.call(Call::ReduceScatter(op), tensor)
    }
}
