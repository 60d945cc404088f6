//! Which transport a run's launcher calls for, by what the user asks for and what this program was built with.

use super::launcher::{Kind, Launcher, count};
use crate::error::{Error, Result};

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
    /// TCP, by any launcher that tells ranks and where rank 0 is; on CPUs for tests.
    Tcp,
}

/// The transport of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Solo,
    Mpi,
    Tcp,
}

/// What this program was built with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Build {
    pub mpi: bool,
    /// NCCL moves gradients and parameters, so that the ranks need no MPI for them.
    pub nccl: bool,
}

/// The transport that the user asked for, if the launcher allows it. R lonely runs are never the answer.
pub(super) fn choose(backend: Backend, launcher: Option<&Launcher>, build: Build) -> Result<Transport> {
    use Backend::{Auto, Mpi, Solo, Tcp};
    let usage = |message: String| Err(Error::Usage(message));
    let Some(launcher) = launcher else { return alone(backend) };
    let ranks = count(launcher.ranks);
    let slowly = "parallel.backend = \"tcp\" joins them without MPI, slowly";
    match (backend, launcher.kind) {
        (Solo, Kind::Batch) => Ok(Transport::Solo),
        (_, Kind::Batch) => usage(format!(
            "this Slurm job has {ranks} tasks, but its script started the program without srun, as one rank: write srun \
             flowrl-dist ... there (slurm/train_glyphs.sh does), or srun --ntasks=1 or parallel.backend = \"solo\" for one rank"
        )),
        (Auto | Mpi, Kind::Mpi) if build.mpi => Ok(Transport::Mpi),
        (Auto | Solo | Tcp, _) if launcher.ranks == Some(1) => Ok(Transport::Solo),
        (Solo, _) => usage(format!(
            "backend = \"solo\" means one rank, but {} started {ranks} ranks: use backend = \"auto\", or start the \
             program without a launcher",
            launcher.name
        )),
        (Tcp, _) => Ok(Transport::Tcp),
        (Auto, _) if build.nccl => Ok(Transport::Tcp),
        (Auto | Mpi, Kind::Srun) => usage(format!(
            "srun started {ranks} tasks that MPI cannot join: use srun --mpi=pmix (or srun --ntasks=1 for one rank); {slowly}"
        )),
        (Auto | Mpi, Kind::Variables) => usage(format!(
            "RANK and WORLD_SIZE tell of {ranks} ranks; several ranks on CPUs need MPI: use mpirun -n {ranks} \
             flowrl-dist ... or srun --mpi=pmix; {slowly}"
        )),
        (Auto | Mpi, Kind::Mpi) => usage(format!(
            "{} started {ranks} ranks, but this program was built without MPI: build it with the feature \"mpi\" (cargo \
             build --release --features mpi), or start it without a launcher; {slowly}",
            launcher.name
        )),
    }
}

/// Of a process that no launcher started.
fn alone(backend: Backend) -> Result<Transport> {
    match backend {
        Backend::Auto | Backend::Solo => Ok(Transport::Solo),
        Backend::Mpi => Err(Error::Usage(
            "backend = \"mpi\", but no launcher started this process: use mpirun -n N flowrl-dist ... or srun \
             --mpi=pmix, or backend = \"auto\" for one rank"
                .into(),
        )),
        Backend::Tcp => Err(Error::Usage(
            "backend = \"tcp\", but no launcher started this process: use srun, mpirun, or a launcher that sets RANK, \
             WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or backend = \"auto\" for one rank"
                .into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::launcher::{detect, tests::variables};

    #[test]
    fn no_launcher_ends_in_lonely_ranks() {
        use Backend::{Auto, Mpi, Solo, Tcp};
        let (none, unknown) = ("", "PMIX_RANK=0");
        let (mpirun, one) = ("OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_SIZE=1");
        let srun = "SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_STEP_ID=0";
        let torchrun = "RANK=0 WORLD_SIZE=4 MASTER_ADDR=n1 MASTER_PORT=9";
        let script = "SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=8";
        let (nothing, with_mpi, both) =
            (Build { mpi: false, nccl: false }, Build { mpi: true, nccl: false }, Build { mpi: true, nccl: true });
        let nccl = Build { mpi: false, nccl: true };
        let table = [
            (Auto, none, with_mpi, Ok(Transport::Solo)),
            (Auto, none, nothing, Ok(Transport::Solo)),
            (Auto, none, both, Ok(Transport::Solo)),
            (Solo, none, with_mpi, Ok(Transport::Solo)),
            (Mpi, none, with_mpi, Err("use mpirun -n N")),
            (Tcp, none, both, Err("MASTER_ADDR")),
            (Auto, mpirun, with_mpi, Ok(Transport::Mpi)),
            (Auto, mpirun, both, Ok(Transport::Mpi)),
            (Auto, one, with_mpi, Ok(Transport::Mpi)),
            (Mpi, mpirun, with_mpi, Ok(Transport::Mpi)),
            (Tcp, mpirun, with_mpi, Ok(Transport::Tcp)),
            (Auto, unknown, with_mpi, Ok(Transport::Mpi)),
            (Auto, mpirun, nothing, Err("mpirun started 2 ranks, but this program was built without MPI")),
            (Auto, mpirun, nccl, Ok(Transport::Tcp)),
            (Mpi, mpirun, nccl, Err("built without MPI")),
            (Mpi, one, nothing, Err("built without MPI")),
            (Auto, one, nothing, Ok(Transport::Solo)),
            (Auto, unknown, nothing, Err("an unknown number of ranks")),
            (Solo, one, with_mpi, Ok(Transport::Solo)),
            (Solo, mpirun, with_mpi, Err("means one rank, but mpirun started 2 ranks")),
            (Solo, unknown, nothing, Err("means one rank")),
            (Auto, srun, with_mpi, Err("use srun --mpi=pmix")),
            (Mpi, srun, both, Err("use srun --mpi=pmix")),
            (Auto, srun, nothing, Err("use srun --mpi=pmix")),
            (Auto, srun, both, Ok(Transport::Tcp)),
            (Tcp, srun, nothing, Ok(Transport::Tcp)),
            (Solo, srun, with_mpi, Err("means one rank, but srun started 4 ranks")),
            (Auto, "RANK=0 WORLD_SIZE=1", nothing, Ok(Transport::Solo)),
            (Auto, torchrun, with_mpi, Err("several ranks on CPUs need MPI")),
            (Auto, torchrun, nccl, Ok(Transport::Tcp)),
            (Mpi, torchrun, both, Err("use mpirun -n 4")),
            (Tcp, torchrun, nothing, Ok(Transport::Tcp)),
            (
                Auto,
                script,
                with_mpi,
                Err("this Slurm job has 8 tasks, but its script started the program without srun"),
            ),
            (Mpi, script, both, Err("without srun")),
            (Tcp, script, nccl, Err("without srun")),
            (Solo, script, with_mpi, Ok(Transport::Solo)),
        ];
        for (backend, text, build, expected) in table {
            let launcher = detect(&variables(text)).unwrap();
            match (choose(backend, launcher.as_ref(), build), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{backend:?} {text} {build:?}"),
                (Err(Error::Usage(message)), Err(part)) => assert!(message.contains(part), "{message}"),
                (found, expected) => panic!("{backend:?} {text} {build:?}: {found:?}, not {expected:?}"),
            }
        }
    }
}
