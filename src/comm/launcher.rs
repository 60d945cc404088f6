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
    /// Nothing, or something that starts one process without MPI.
    None,
    /// A launcher that MPI can join ranks under; the number of ranks where it tells.
    Mpi { name: &'static str, ranks: Option<usize> },
    /// `srun` without a process manager that MPI could ask for its peers.
    SrunWithoutPmi { ranks: usize },
}

/// The transport of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Solo,
    Mpi,
}

/// Tells the launcher from its variables.
pub(super) fn detect(variables: &Variables) -> Launcher {
    let is_set = |name: &str| variables.contains_key(name);
    let number = |name: &str| variables.get(name)?.trim().parse::<usize>().ok();
    // Inside a step SLURM_NTASKS may still be the whole allocation's.
    let slurm_ranks = number("SLURM_STEP_NUM_TASKS").or_else(|| number("SLURM_NTASKS"));
    if is_set("OMPI_COMM_WORLD_SIZE") {
        // First, because mpirun inside a Slurm allocation leaves Slurm's variables too.
        return Launcher::Mpi { name: "mpirun", ranks: number("OMPI_COMM_WORLD_SIZE") };
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

/// The transport that the user asked for, if the launcher allows it. R lonely runs are never the answer.
pub(super) fn choose(backend: Backend, launcher: &Launcher, built_with_mpi: bool) -> Result<Transport> {
    let usage = |message: String| Err(Error::Usage(message));
    match (backend, launcher) {
        (Backend::Auto | Backend::Mpi, Launcher::SrunWithoutPmi { ranks }) => usage(format!(
            "srun started {ranks} tasks that cannot find each other: use srun --mpi=pmix (or srun --ntasks=1 for one rank)"
        )),
        (Backend::Solo, Launcher::SrunWithoutPmi { ranks }) => usage(solo_among("srun", &ranks.to_string())),
        (Backend::Auto | Backend::Solo, Launcher::None) => Ok(Transport::Solo),
        (Backend::Mpi, Launcher::None) => usage(
            "backend = \"mpi\", but no launcher started this process: use mpirun -n N flowrl-dist ... or srun \
             --mpi=pmix, or backend = \"auto\" for one rank"
                .into(),
        ),
        (Backend::Solo, Launcher::Mpi { ranks: Some(1), .. }) => Ok(Transport::Solo),
        (Backend::Solo, Launcher::Mpi { name, ranks }) => usage(solo_among(name, &count(*ranks))),
        (Backend::Auto | Backend::Mpi, Launcher::Mpi { .. }) if built_with_mpi => Ok(Transport::Mpi),
        (Backend::Auto, Launcher::Mpi { ranks: Some(1), .. }) => Ok(Transport::Solo),
        (Backend::Auto | Backend::Mpi, Launcher::Mpi { name, ranks }) => usage(format!(
            "{name} started {} ranks, but this program was built without MPI: build it with the feature \"mpi\" (cargo \
             build --release --features mpi), or start it without a launcher",
            count(*ranks)
        )),
    }
}

fn count(ranks: Option<usize>) -> String {
    ranks.map_or("an unknown number of".into(), |ranks| ranks.to_string())
}

fn solo_among(launcher: &str, ranks: &str) -> String {
    format!(
        "backend = \"solo\" means one rank, but {launcher} started {ranks} ranks: use backend = \"auto\", or start the \
         program without a launcher"
    )
}

/// Number of ranks, where the launcher tells.
pub(super) fn ranks(variables: &Variables) -> Option<usize> {
    match detect(variables) {
        Launcher::None => Some(1),
        Launcher::Mpi { ranks, .. } => ranks,
        Launcher::SrunWithoutPmi { ranks } => Some(ranks),
    }
}

/// This rank, by the launcher's word; 0 where it tells nothing.
pub(super) fn rank(variables: &Variables) -> usize {
    let number = |name: &&str| variables.get(*name)?.trim().parse::<usize>().ok();
    ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"].iter().find_map(number).unwrap_or(0)
}

/// This rank's number on its host and the ranks there, where the launcher tells.
pub(super) fn local(variables: &Variables) -> (Option<usize>, Option<usize>) {
    let number = |names: &[&str]| names.iter().find_map(|&name| variables.get(name)?.trim().parse::<usize>().ok());
    let rank = number(&["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"]);
    let ranks = number(&["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"]);
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
        ];
        for (text, expected) in table {
            assert_eq!(detect(&variables(text)), expected, "{text}");
        }
    }

    #[test]
    fn no_launcher_ends_in_lonely_ranks() {
        use Backend::{Auto, Mpi, Solo};
        let srun = Launcher::SrunWithoutPmi { ranks: 4 };
        let table = [
            (Auto, NONE, true, Ok(Transport::Solo)),
            (Auto, NONE, false, Ok(Transport::Solo)),
            (Solo, NONE, true, Ok(Transport::Solo)),
            (Mpi, NONE, true, Err("use mpirun -n N")),
            (Auto, mpi("mpirun", 2), true, Ok(Transport::Mpi)),
            (Auto, mpi("mpirun", 1), true, Ok(Transport::Mpi)),
            (Mpi, mpi("mpirun", 2), true, Ok(Transport::Mpi)),
            (Auto, mpi("mpirun", None), true, Ok(Transport::Mpi)),
            (Auto, mpi("mpirun", 2), false, Err("mpirun started 2 ranks, but this program was built without MPI")),
            (Mpi, mpi("mpirun", 1), false, Err("built without MPI")),
            (Auto, mpi("mpirun", 1), false, Ok(Transport::Solo)),
            (Auto, mpi("mpirun", None), false, Err("an unknown number of ranks")),
            (Solo, mpi("mpirun", 1), true, Ok(Transport::Solo)),
            (Solo, mpi("mpirun", 2), true, Err("means one rank, but mpirun started 2 ranks")),
            (Solo, mpi("mpirun", None), false, Err("means one rank")),
            (Auto, srun.clone(), true, Err("use srun --mpi=pmix")),
            (Mpi, srun.clone(), true, Err("use srun --mpi=pmix")),
            (Auto, srun.clone(), false, Err("use srun --mpi=pmix")),
            (Solo, srun, true, Err("means one rank, but srun started 4 ranks")),
        ];
        for (backend, launcher, built_with_mpi, expected) in table {
            match (choose(backend, &launcher, built_with_mpi), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected),
                (Err(Error::Usage(message)), Err(part)) => assert!(message.contains(part), "{message}"),
                (found, expected) => panic!("{backend:?} {launcher:?}: {found:?}, not {expected:?}"),
            }
        }
    }

    #[test]
    fn local_ranks_are_read_where_they_are_told() {
        let table = [
            ("OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=4 SLURM_LOCALID=0", (Some(1), Some(4))),
            ("SLURM_LOCALID=3", (Some(3), None)),
            ("MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2", (Some(0), Some(2))),
            ("", (None, None)),
        ];
        for (text, expected) in table {
            assert_eq!(local(&variables(text)), expected, "{text}");
        }
    }
}
