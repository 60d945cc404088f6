//! Who started this process, by the variables it left; and which transport that calls for.
//!
//! Looked at before MPI is initialised, because a process alone needs no MPI, and MPI_Init under the wrong launcher
//! ends in the library's own fatal error.

use super::Backend;
use crate::error::{Error, Result};
use std::collections::HashMap;

/// The environment's variables.
pub(super) type Variables = HashMap<String, String>;

/// The environment's variables, those that are text.
pub(super) fn environment() -> Variables {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// What started this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Launcher {
    /// Nothing, or something that starts one process.
    None,
    /// A launcher that MPI can join ranks under; the number of ranks where it tells.
    Mpi { name: &'static str, ranks: Option<usize> },
    /// `srun` without a process manager that MPI could ask for its peers.
    SrunWithoutPmi { ranks: usize },
    /// The variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.
    Torchrun { ranks: usize },
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

/// The number in a variable.
pub(super) fn number(variables: &Variables, name: &str) -> Option<usize> {
    variables.get(name)?.trim().parse().ok()
}

/// Tells the launcher from its variables.
pub(super) fn detect(variables: &Variables) -> Launcher {
    let is_set = |name: &str| variables.contains_key(name);
    let number = |name: &str| number(variables, name);
    // Inside a step SLURM_NTASKS may still be the whole allocation's.
    let slurm_ranks = number("SLURM_STEP_NUM_TASKS").or_else(|| number("SLURM_NTASKS"));
    if is_set("OMPI_COMM_WORLD_SIZE") {
        // First, because mpirun inside a Slurm allocation leaves Slurm's variables too.
        return Launcher::Mpi { name: "mpirun", ranks: number("OMPI_COMM_WORLD_SIZE") };
    }
    if let (true, Some(ranks)) = (is_torchrun(variables), number("WORLD_SIZE")) {
        // Before Slurm, whose tasks may each be a torchrun.
        return Launcher::Torchrun { ranks };
    }
    if is_set("PMIX_RANK") {
        let name = if is_set("SLURM_PROCID") { "srun --mpi=pmix" } else { "a PMIx launcher" };
        return Launcher::Mpi { name, ranks: slurm_ranks.filter(|_| is_set("SLURM_PROCID")) };
    }
    if is_set("PMI_RANK") || is_set("PMI_SIZE") || is_set("PMI_FD") {
        return Launcher::Mpi { name: "mpiexec (PMI)", ranks: number("PMI_SIZE") };
    }
    match slurm_ranks {
        Some(ranks) if ranks > 1 && (is_set("SLURM_STEP_ID") || is_set("SLURM_STEPID")) => {
            Launcher::SrunWithoutPmi { ranks }
        }
        _ => Launcher::None,
    }
}

fn is_torchrun(variables: &Variables) -> bool {
    ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"].iter().all(|&name| variables.contains_key(name))
}

/// The transport that the user asked for, if the launcher allows it. R lonely runs are never the answer.
pub(super) fn choose(backend: Backend, launcher: &Launcher, build: Build) -> Result<Transport> {
    use Backend::{Auto, Mpi, Solo, Tcp};
    let usage = |message: String| Err(Error::Usage(message));
    let ranks = launcher.ranks();
    match (backend, launcher) {
        (Auto | Solo, Launcher::None) => Ok(Transport::Solo),
        (Mpi, Launcher::None) => usage(
            "backend = \"mpi\", but no launcher started this process: use mpirun -n N flowrl-dist ... or srun \
             --mpi=pmix, or backend = \"auto\" for one rank"
                .into(),
        ),
        (Tcp, Launcher::None) => usage(
            "backend = \"tcp\", but no launcher started this process: use srun, mpirun, or a launcher that sets RANK, \
             WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or backend = \"auto\" for one rank"
                .into(),
        ),
        (Auto | Mpi, Launcher::Mpi { .. }) if build.mpi => Ok(Transport::Mpi),
        (Auto | Solo | Tcp, _) if ranks == Some(1) => Ok(Transport::Solo),
        (Solo, _) => usage(format!(
            "backend = \"solo\" means one rank, but {} started {} ranks: use backend = \"auto\", or start the \
             program without a launcher",
            launcher.name(),
            count(ranks)
        )),
        (Tcp, _) => Ok(Transport::Tcp),
        (Auto, _) if build.nccl => Ok(Transport::Tcp),
        (Auto | Mpi, Launcher::SrunWithoutPmi { ranks }) => usage(format!(
            "srun started {ranks} tasks that MPI cannot join: use srun --mpi=pmix (or srun --ntasks=1 for one rank); \
             parallel.backend = \"tcp\" joins them without MPI, slowly"
        )),
        (Auto | Mpi, Launcher::Torchrun { ranks }) => usage(format!(
            "RANK and WORLD_SIZE tell of {ranks} ranks; several ranks on CPUs need MPI: use mpirun -n {ranks} \
             flowrl-dist ... or srun --mpi=pmix; parallel.backend = \"tcp\" joins them without MPI, slowly"
        )),
        (Auto | Mpi, Launcher::Mpi { name, .. }) => usage(format!(
            "{name} started {} ranks, but this program was built without MPI: build it with the feature \"mpi\" (cargo \
             build --release --features mpi), or start it without a launcher; parallel.backend = \"tcp\" joins them \
             without MPI, slowly",
            count(ranks)
        )),
    }
}

impl Launcher {
    /// Number of ranks, where it tells.
    fn ranks(&self) -> Option<usize> {
        match self {
            Launcher::None => Some(1),
            Launcher::Mpi { ranks, .. } => *ranks,
            Launcher::SrunWithoutPmi { ranks } | Launcher::Torchrun { ranks } => Some(*ranks),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Launcher::None => "nothing",
            Launcher::Mpi { name, .. } => name,
            Launcher::SrunWithoutPmi { .. } => "srun",
            Launcher::Torchrun { .. } => "torchrun",
        }
    }
}

fn count(ranks: Option<usize>) -> String {
    ranks.map_or("an unknown number of".into(), |ranks| ranks.to_string())
}

/// Number of ranks, where the launcher tells.
pub(super) fn ranks(variables: &Variables) -> Option<usize> {
    detect(variables).ranks()
}

/// This rank, by the launcher's word; 0 where it tells nothing.
pub(super) fn rank(variables: &Variables) -> usize {
    let names: &[&str] = match detect(variables) {
        Launcher::Torchrun { .. } => &["RANK"],
        _ => &["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"],
    };
    names.iter().find_map(|name| number(variables, name)).unwrap_or(0)
}

/// This rank's number on its host and the ranks there, where the launcher tells.
pub(super) fn local(variables: &Variables) -> (Option<usize>, Option<usize>) {
    if let Launcher::Torchrun { .. } = detect(variables) {
        return (number(variables, "LOCAL_RANK"), number(variables, "LOCAL_WORLD_SIZE"));
    }
    let first = |names: &[&str]| names.iter().find_map(|name| number(variables, name));
    let rank = first(&["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"]);
    let ranks = first(&["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"]);
    (rank, ranks)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Launcher = Launcher::None;

    fn variables(text: &str) -> Variables {
        text.split_whitespace().filter_map(|v| v.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
    }

    fn mpi(name: &'static str, ranks: impl Into<Option<usize>>) -> Launcher {
        Launcher::Mpi { name, ranks: ranks.into() }
    }

    #[test]
    fn launchers_are_told_by_their_variables() {
        let table = [
            ("", NONE),
            ("HOME=/root SLURM_CONF=/etc/slurm.conf", NONE),
            ("OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=1 PMIX_RANK=1", mpi("mpirun", 4)),
            // mpirun inside an allocation
            ("OMPI_COMM_WORLD_SIZE=2 PMIX_RANK=0 SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_STEP_ID=0", mpi("mpirun", 2)),
            ("PMI_RANK=0 PMI_SIZE=2 PMI_FD=7", mpi("mpiexec (PMI)", 2)),
            ("PMI_FD=7", mpi("mpiexec (PMI)", None)),
            ("PMIX_RANK=3 SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_STEP_ID=0", mpi("srun --mpi=pmix", 4)),
            ("PMIX_RANK=1 SLURM_PROCID=1 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=2", mpi("srun --mpi=pmix", 2)),
            ("PMIX_RANK=1", mpi("a PMIx launcher", None)),
            // srun --mpi=none, srun --mpi=pmi2, a batch script, an interactive step
            ("SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_STEP_ID=0", Launcher::SrunWithoutPmi { ranks: 4 }),
            ("SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_STEP_ID=0 PMI_RANK=1 PMI_SIZE=4", mpi("mpiexec (PMI)", 4)),
            ("SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=4", NONE),
            ("SLURM_NTASKS=4 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1", NONE),
            ("SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_ID=0", NONE),
            ("RANK=1 WORLD_SIZE=4 MASTER_ADDR=n1 MASTER_PORT=9", Launcher::Torchrun { ranks: 4 }),
            (
                "RANK=1 WORLD_SIZE=4 MASTER_ADDR=n1 MASTER_PORT=9 SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_ID=0",
                Launcher::Torchrun { ranks: 4 },
            ),
            ("RANK=1 WORLD_SIZE=4", NONE),
            ("OMPI_COMM_WORLD_SIZE=2 RANK=1 WORLD_SIZE=4 MASTER_ADDR=n1 MASTER_PORT=9", mpi("mpirun", 2)),
        ];
        for (text, expected) in table {
            assert_eq!(detect(&variables(text)), expected, "{text}");
        }
    }

    #[test]
    fn no_launcher_ends_in_lonely_ranks() {
        use Backend::{Auto, Mpi, Solo, Tcp};
        let srun = Launcher::SrunWithoutPmi { ranks: 4 };
        let torchrun = |ranks| Launcher::Torchrun { ranks };
        let (nothing, with_mpi, both) =
            (Build { mpi: false, nccl: false }, Build { mpi: true, nccl: false }, Build { mpi: true, nccl: true });
        let nccl = Build { mpi: false, nccl: true };
        let table = [
            (Auto, NONE, with_mpi, Ok(Transport::Solo)),
            (Auto, NONE, nothing, Ok(Transport::Solo)),
            (Auto, NONE, both, Ok(Transport::Solo)),
            (Solo, NONE, with_mpi, Ok(Transport::Solo)),
            (Mpi, NONE, with_mpi, Err("use mpirun -n N")),
            (Tcp, NONE, both, Err("MASTER_ADDR")),
            (Auto, mpi("mpirun", 2), with_mpi, Ok(Transport::Mpi)),
            (Auto, mpi("mpirun", 2), both, Ok(Transport::Mpi)),
            (Auto, mpi("mpirun", 1), with_mpi, Ok(Transport::Mpi)),
            (Mpi, mpi("mpirun", 2), with_mpi, Ok(Transport::Mpi)),
            (Tcp, mpi("mpirun", 2), with_mpi, Ok(Transport::Tcp)),
            (Auto, mpi("mpirun", None), with_mpi, Ok(Transport::Mpi)),
            (Auto, mpi("mpirun", 2), nothing, Err("mpirun started 2 ranks, but this program was built without MPI")),
            (Auto, mpi("mpirun", 2), nccl, Ok(Transport::Tcp)),
            (Mpi, mpi("mpirun", 2), nccl, Err("built without MPI")),
            (Mpi, mpi("mpirun", 1), nothing, Err("built without MPI")),
            (Auto, mpi("mpirun", 1), nothing, Ok(Transport::Solo)),
            (Auto, mpi("mpirun", None), nothing, Err("an unknown number of ranks")),
            (Solo, mpi("mpirun", 1), with_mpi, Ok(Transport::Solo)),
            (Solo, mpi("mpirun", 2), with_mpi, Err("means one rank, but mpirun started 2 ranks")),
            (Solo, mpi("mpirun", None), nothing, Err("means one rank")),
            (Auto, srun.clone(), with_mpi, Err("use srun --mpi=pmix")),
            (Mpi, srun.clone(), both, Err("use srun --mpi=pmix")),
            (Auto, srun.clone(), nothing, Err("use srun --mpi=pmix")),
            (Auto, srun.clone(), both, Ok(Transport::Tcp)),
            (Tcp, srun.clone(), nothing, Ok(Transport::Tcp)),
            (Solo, srun, with_mpi, Err("means one rank, but srun started 4 ranks")),
            (Auto, torchrun(1), nothing, Ok(Transport::Solo)),
            (Auto, torchrun(4), with_mpi, Err("several ranks on CPUs need MPI")),
            (Auto, torchrun(4), nccl, Ok(Transport::Tcp)),
            (Mpi, torchrun(4), both, Err("use mpirun -n 4")),
            (Tcp, torchrun(4), nothing, Ok(Transport::Tcp)),
        ];
        for (backend, launcher, build, expected) in table {
            match (choose(backend, &launcher, build), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{backend:?} {launcher:?} {build:?}"),
                (Err(Error::Usage(message)), Err(part)) => assert!(message.contains(part), "{message}"),
                (found, expected) => panic!("{backend:?} {launcher:?} {build:?}: {found:?}, not {expected:?}"),
            }
        }
    }

    #[test]
    fn local_ranks_are_read_where_they_are_told() {
        let table = [
            ("OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=4 SLURM_LOCALID=0", (Some(1), Some(4))),
            ("SLURM_LOCALID=3", (Some(3), None)),
            ("MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2", (Some(0), Some(2))),
            ("RANK=5 WORLD_SIZE=8 MASTER_ADDR=n1 MASTER_PORT=9 LOCAL_RANK=1 SLURM_LOCALID=0", (Some(1), None)),
            ("", (None, None)),
        ];
        for (text, expected) in table {
            assert_eq!(local(&variables(text)), expected, "{text}");
        }
    }
}
