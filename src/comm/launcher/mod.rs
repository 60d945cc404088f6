//! Who started this process, by the variables it left.
//!
//! Looked at before MPI is initialised, because a process alone needs no MPI, and MPI_Init under the wrong launcher
//! ends in the library's own fatal error.

mod marks;

use crate::error::{Error, Result};
use marks::{MPI_LAUNCHERS, SRUN, TORCHRUN, told};
use std::collections::HashMap;

pub(super) use marks::MPIRUN;

/// The environment's variables.
pub(super) type Variables = HashMap<String, String>;

/// The environment's variables, those that are text.
pub(super) fn environment() -> Variables {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// How the ranks that a launcher starts can find each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// MPI can ask the launcher for its peers.
    Mpi,
    /// `srun` without a process manager that MPI could ask.
    Srun,
    /// RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.
    Variables,
    /// The script of a Slurm job of several tasks: one process, which no launcher started.
    Batch,
}

/// What started this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Launcher {
    pub kind: Kind,
    /// As its users call it.
    pub name: &'static str,
    /// This rank; 0 where it is not told.
    pub rank: usize,
    /// Number of ranks, where it is told; of a batch script the job's tasks.
    pub ranks: Option<usize>,
    /// This rank's number on its host, where it is told.
    pub local_rank: Option<usize>,
    /// Number of ranks on this host, where it is told.
    pub local_ranks: Option<usize>,
}

/// Tells the launcher from its variables; none where nothing started this process, or something that starts one.
///
/// # Errors
/// [`Error::Usage`] where the variables do not say who this rank is: the variable, its value and the remedy.
pub(super) fn detect(variables: &Variables) -> Result<Option<Launcher>> {
    let by_hand = by_hand(variables)?;
    if variables.contains_key("TORCHELASTIC_RUN_ID") && by_hand.is_some() {
        // torchrun itself, which mpirun or srun may have started.
        return complete(by_hand, variables);
    }
    match (launched(variables)?, by_hand) {
        (None, None) => batch(variables),
        (None, by_hand) => complete(by_hand, variables),
        (launched, None) => Ok(launched),
        // An echo of it, as scripts around it leave one.
        (Some(launched), Some(by_hand)) if launched.ranks == by_hand.ranks && launched.rank == by_hand.rank => {
            Ok(Some(launched))
        }
        (launched, Some(by_hand)) if by_hand.ranks == Some(1) => Ok(launched),
        // Each of Slurm's tasks may start ranks in its turn.
        (Some(launched), by_hand) if launched.name != MPIRUN && variables.contains_key("SLURM_PROCID") => {
            complete(by_hand, variables)
        }
        (Some(launched), Some(by_hand)) => Err(Error::Usage(format!(
            "two launchers have left their variables: {} calls this rank {} of {}, RANK and WORLD_SIZE call it {} of {}: \
             unset those of the one that did not start this program (env -u RANK -u WORLD_SIZE ...)",
            launched.name,
            launched.rank,
            count(launched.ranks),
            by_hand.rank,
            count(by_hand.ranks)
        ))),
    }
}

/// What launchers of their own variables say.
fn launched(variables: &Variables) -> Result<Option<Launcher>> {
    for marks in &MPI_LAUNCHERS {
        if let Some(found) = marks.find(variables)? {
            return Ok(Some(found));
        }
    }
    srun(variables)
}

/// What RANK and WORLD_SIZE say.
///
/// # Errors
/// Only one of them is set.
fn by_hand(variables: &Variables) -> Result<Option<Launcher>> {
    let found = TORCHRUN.find(variables)?;
    let names = ["RANK", "WORLD_SIZE"];
    if let Some(missing) = names.iter().find(|&&name| found.is_some() && !variables.contains_key(name)) {
        let set = names[usize::from(missing == &names[0])];
        return Err(Error::Usage(format!(
            "{set} is {:?}, but {missing} is not set: set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each rank, or \
             unset {set} to start one rank",
            variables[set]
        )));
    }
    Ok(found)
}

/// Refuses ranks that are not told where they meet.
fn complete(by_hand: Option<Launcher>, variables: &Variables) -> Result<Option<Launcher>> {
    let missing = ["MASTER_ADDR", "MASTER_PORT"].into_iter().find(|&name| !variables.contains_key(name));
    match (&by_hand, missing) {
        (Some(Launcher { rank, ranks: Some(ranks), .. }), Some(missing)) if *ranks > 1 => Err(Error::Usage(format!(
            "RANK and WORLD_SIZE call this rank {rank} of {ranks}, but {missing} is not set: set MASTER_ADDR to the name of \
             rank 0's host and MASTER_PORT to a free port there, the same on all ranks, or unset RANK and WORLD_SIZE to start \
             one rank"
        ))),
        _ => Ok(by_hand),
    }
}

/// A step of several tasks.
fn srun(variables: &Variables) -> Result<Option<Launcher>> {
    let found = if is_step(variables) { SRUN.find(variables)? } else { None };
    Ok(found.filter(|launcher| launcher.ranks.is_some_and(|ranks| ranks > 1)))
}

fn is_step(variables: &Variables) -> bool {
    variables.contains_key("SLURM_STEP_ID") || variables.contains_key("SLURM_STEPID")
}

/// The script of a job of several tasks, which none but `srun` and mpirun start. The shell of `salloc` is no task, and an
/// interactive step is one of its own.
fn batch(variables: &Variables) -> Result<Option<Launcher>> {
    let is_script = variables.contains_key("SLURM_JOB_ID") && variables.contains_key("SLURM_PROCID");
    if !is_script || is_step(variables) {
        return Ok(None);
    }
    let number = |name: &'static str| told(variables, &[name]);
    let tasks = match (number("SLURM_NTASKS")?, number("SLURM_NTASKS_PER_NODE")?, number("SLURM_JOB_NUM_NODES")?) {
        (Some(tasks), ..) => tasks.number,
        (None, per_node, nodes) => per_node.map_or(1, |told| told.number) * nodes.map_or(1, |told| told.number),
    };
    let script = Launcher {
        kind: Kind::Batch,
        name: "the script of a Slurm job",
        rank: 0,
        ranks: Some(tasks),
        local_rank: None,
        local_ranks: None,
    };
    Ok(Some(script).filter(|_| tasks > 1))
}

/// "4", or "an unknown number of".
pub(super) fn count(ranks: Option<usize>) -> String {
    ranks.map_or("an unknown number of".into(), |ranks| ranks.to_string())
}

impl Launcher {
    /// Number of ranks that it started, where it is told; a script is one process.
    pub fn started(&self) -> Option<usize> {
        if self.kind == Kind::Batch { Some(1) } else { self.ranks }
    }

    /// Refuses a world of MPI that is not the launcher's: a program of one MPI under the launcher of another is as many runs
    /// of one rank.
    #[cfg(any(feature = "mpi", test))]
    pub fn check_world(&self, ranks: usize, library: &str) -> Result<()> {
        // At least so many, where the launcher does not tell.
        let least = self.local_ranks.unwrap_or(1).max(self.rank + 1);
        let differs = self.ranks.map_or(ranks < least, |told| told != ranks);
        if !differs {
            return Ok(());
        }
        let told = self.ranks.map_or(format!("at least {least}"), |told| told.to_string());
        Err(Error::Usage(format!(
            "{} started {told} ranks, but MPI ({library}), which this program was built with, joins {ranks}: start it by the \
             launcher of that MPI (its own mpirun, or srun with the --mpi= that it knows), or build it with the MPI of this \
             launcher",
            self.name
        )))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Variables as a shell writes them, separated by spaces.
    pub(in crate::comm) fn variables(text: &str) -> Variables {
        text.split_whitespace().filter_map(|v| v.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
    }

    #[test]
    fn launchers_are_told_by_their_variables() {
        use Kind::{Batch, Mpi, Srun, Variables};
        let (mpirun, mpiexec) = ("OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1", "PMI_RANK=0 PMI_SIZE=2 PMI_FD=7");
        let torchrun = "RANK=1 WORLD_SIZE=4 MASTER_ADDR=n1 MASTER_PORT=9";
        let table = [
            (mpirun.to_owned(), Some((Mpi, "mpirun", Some(2)))),
            // In an allocation.
            (
                format!("{mpirun} PMIX_RANK=0 SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_STEP_ID=0"),
                Some((Mpi, "mpirun", Some(2))),
            ),
            (mpiexec.to_owned(), Some((Mpi, "mpiexec (PMI)", Some(2)))),
            // In a shell that srun --mpi=pmix --pty started.
            (
                format!("{mpiexec} PMIX_RANK=0 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1"),
                Some((Mpi, "mpiexec (PMI)", Some(2))),
            ),
            ("PMI_PORT=n1:9 PMI_ID=3".into(), Some((Mpi, "mpiexec (PMI)", None))),
            (
                "PMIX_RANK=3 SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_STEP_ID=0".into(),
                Some((Mpi, "srun --mpi=pmix", Some(4))),
            ),
            (
                "PMIX_RANK=1 SLURM_PROCID=1 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=2".into(),
                Some((Mpi, "srun --mpi=pmix", Some(2))),
            ),
            ("PMIX_RANK=1".into(), Some((Mpi, "a PMIx launcher", None))),
            ("FLUX_TASK_RANK=1 FLUX_JOB_SIZE=2".into(), Some((Mpi, "flux run", Some(2)))),
            ("PALS_RANKID=1 PALS_LOCAL_RANKID=0".into(), Some((Mpi, "mpiexec (PALS)", None))),
            // srun --mpi=none, and --mpi=pmi2.
            ("SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_STEP_ID=0".into(), Some((Srun, "srun", Some(4)))),
            (
                "SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_STEP_ID=0 PMI_RANK=1 PMI_SIZE=4".into(),
                Some((Mpi, "mpiexec (PMI)", Some(4))),
            ),
            (torchrun.into(), Some((Variables, "torchrun", Some(4)))),
            ("RANK=0 WORLD_SIZE=1".into(), Some((Variables, "torchrun", Some(1)))),
            // Each of Slurm's tasks a torchrun, and each of mpirun's.
            (
                format!("{torchrun} SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_ID=0"),
                Some((Variables, "torchrun", Some(4))),
            ),
            (format!("{torchrun} {mpirun} TORCHELASTIC_RUN_ID=none"), Some((Variables, "torchrun", Some(4)))),
            // A script that echoes mpirun's, and a pod of one.
            (format!("{mpirun} RANK=1 WORLD_SIZE=2"), Some((Mpi, "mpirun", Some(2)))),
            (format!("{mpirun} RANK=0 WORLD_SIZE=1"), Some((Mpi, "mpirun", Some(2)))),
            // The script of sbatch, by --ntasks and by --ntasks-per-node.
            (
                "SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=4".into(),
                Some((Batch, "the script of a Slurm job", Some(4))),
            ),
            (
                "SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS_PER_NODE=2 SLURM_JOB_NUM_NODES=3".into(),
                Some((Batch, "the script of a Slurm job", Some(6))),
            ),
            ("SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1".into(), None),
            // The shell of salloc, an interactive step, one task of srun.
            ("SLURM_JOB_ID=7 SLURM_NTASKS=8 SLURM_JOB_NUM_NODES=2".into(), None),
            ("SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1".into(), None),
            ("SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_ID=0".into(), None),
            ("HOME=/root SLURM_CONF=/etc/slurm.conf MASTER_ADDR=n1 LOCAL_RANK=x".into(), None),
        ];
        for (text, expected) in table {
            let found = detect(&variables(&text)).unwrap();
            let found = found.as_ref().map(|launcher| (launcher.kind, launcher.name, launcher.ranks));
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn what_does_not_say_who_a_rank_is_is_refused() {
        let meeting = "MASTER_ADDR=n1 MASTER_PORT=9";
        let table = [
            ("RANK=0 WORLD_SIZE=2", "call this rank 0 of 2, but MASTER_ADDR is not set"),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=n1", "MASTER_PORT is not set"),
            ("RANK=abc WORLD_SIZE=2 MASTER_ADDR=n1", "RANK is \"abc\""),
            ("RANK=-1 WORLD_SIZE=2 MASTER_ADDR=n1", "RANK is \"-1\""),
            ("RANK= WORLD_SIZE=2", "RANK is \"\""),
            ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE is \"two\""),
            ("RANK=0", "RANK is \"0\", but WORLD_SIZE is not set"),
            ("WORLD_SIZE=2", "WORLD_SIZE is \"2\", but RANK is not set"),
            ("RANK=2 WORLD_SIZE=2", "RANK is 2, but WORLD_SIZE is 2"),
            ("RANK=0 WORLD_SIZE=0", "RANK is 0, but WORLD_SIZE is 0"),
            ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=gpu", "LOCAL_RANK is \"gpu\""),
            ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1", "LOCAL_RANK is 1, but LOCAL_WORLD_SIZE is 1"),
            ("OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=2", "OMPI_COMM_WORLD_RANK is 2"),
            ("PMI_RANK=0 PMI_SIZE=x", "PMI_SIZE is \"x\""),
            ("SLURM_PROCID=4 SLURM_NTASKS=4 SLURM_STEP_ID=0", "SLURM_PROCID is 4, but SLURM_NTASKS is 4"),
            ("SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=many", "SLURM_NTASKS is \"many\""),
            (
                "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1 RANK=1 WORLD_SIZE=4",
                "mpirun calls this rank 1 of 2, RANK and WORLD_SIZE call it 1 of 4",
            ),
            ("PMI_RANK=0 PMI_SIZE=2 RANK=1 WORLD_SIZE=2", "mpiexec (PMI) calls this rank 0 of 2, RANK and"),
        ];
        for (text, words) in table {
            // Where they meet changes nothing but what is said of that.
            for text in [text.to_owned(), format!("{meeting} {text}")] {
                if words.contains("MASTER") && text.contains(meeting) {
                    continue;
                }
                let message = detect(&variables(&text)).unwrap_err().to_string();
                assert!(message.contains(words), "{text}: {message}");
            }
        }
    }

    #[test]
    fn a_world_of_mpi_is_the_launchers() {
        let launcher = |text: &str| detect(&variables(text)).unwrap().unwrap();
        let table = [
            ("OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1", 2, None),
            ("OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0", 1, Some("mpirun started 2 ranks, but MPI (Open MPI 4)")),
            ("PMI_RANK=0 PMI_SIZE=2", 1, Some("mpiexec (PMI) started 2 ranks")),
            ("PMI_RANK=0 PMI_SIZE=2", 4, Some("joins 4")),
            ("PMIX_RANK=0 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=4", 1, Some("srun --mpi=pmix started 4 ranks")),
            // Where no number of ranks is told, more than one rank is told all the same.
            ("PMIX_RANK=3", 1, Some("a PMIx launcher started at least 4 ranks")),
            ("PMI_ID=0 PMI_PORT=n1:9 MPI_LOCALNRANKS=2", 1, Some("started at least 2 ranks")),
            ("PMIX_RANK=3", 8, None),
            ("PMIX_RANK=0", 1, None),
        ];
        for (text, ranks, refused) in table {
            match (launcher(text).check_world(ranks, "Open MPI 4"), refused) {
                (Ok(()), None) => (),
                (Err(e), Some(words)) => assert!(e.to_string().contains(words), "{text}: {e}"),
                (found, _) => panic!("{text}, {ranks} in MPI: {found:?}"),
            }
        }
    }

    #[test]
    fn local_ranks_are_read_where_they_are_told() {
        let table = [
            ("OMPI_COMM_WORLD_SIZE=9 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=4", (Some(1), Some(4))),
            ("SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_STEP_ID=0 SLURM_LOCALID=3", (Some(3), None)),
            ("PMI_RANK=0 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2 SLURM_LOCALID=1", (Some(0), Some(2))),
            ("RANK=5 WORLD_SIZE=8 MASTER_ADDR=n1 MASTER_PORT=9 LOCAL_RANK=1 SLURM_LOCALID=0", (Some(1), None)),
        ];
        for (text, expected) in table {
            let launcher = detect(&variables(text)).unwrap().unwrap();
            assert_eq!((launcher.local_rank, launcher.local_ranks), expected, "{text}");
        }
    }
}
