//! The one table of launchers: by which variables each is known, and where it tells what.

use super::{Kind, Launcher, Variables};
use crate::error::{Error, Result};

/// The variables of a launcher. Of several names for a number the first that is set counts.
pub(super) struct Marks {
    kind: Kind,
    name: &'static str,
    /// One of these is set, and all of `beside`.
    told_by: &'static [&'static str],
    beside: &'static [&'static str],
    rank: &'static [&'static str],
    ranks: &'static [&'static str],
    local_rank: &'static [&'static str],
    local_ranks: &'static [&'static str],
}

/// In a step SLURM_NTASKS may still be the whole allocation's.
const SLURM_TASKS: &[&str] = &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"];

/// Launchers of MPI, those first whose variables others may inherit: mpirun and mpiexec run inside of Slurm's steps.
pub(super) const MPI_LAUNCHERS: [Marks; 6] = [
    Marks {
        kind: Kind::Mpi,
        name: MPIRUN,
        told_by: &["OMPI_COMM_WORLD_SIZE"],
        beside: &[],
        rank: &["OMPI_COMM_WORLD_RANK"],
        ranks: &["OMPI_COMM_WORLD_SIZE"],
        local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
        local_ranks: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
    },
    // Also srun --mpi=pmi2 and --mpi=cray_shasta.
    Marks {
        kind: Kind::Mpi,
        name: "mpiexec (PMI)",
        told_by: &["PMI_RANK", "PMI_SIZE", "PMI_FD", "PMI_PORT"],
        beside: &[],
        rank: &["PMI_RANK", "PMI_ID"],
        ranks: &["PMI_SIZE"],
        local_rank: &["MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"],
        local_ranks: &["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"],
    },
    Marks {
        kind: Kind::Mpi,
        name: "srun --mpi=pmix",
        told_by: &["PMIX_RANK"],
        beside: &["SLURM_PROCID"],
        rank: &["PMIX_RANK"],
        ranks: SLURM_TASKS,
        local_rank: &["SLURM_LOCALID"],
        local_ranks: &[],
    },
    Marks {
        kind: Kind::Mpi,
        name: "a PMIx launcher",
        told_by: &["PMIX_RANK"],
        beside: &[],
        rank: &["PMIX_RANK"],
        ranks: &[],
        local_rank: &[],
        local_ranks: &[],
    },
    Marks {
        kind: Kind::Mpi,
        name: "flux run",
        told_by: &["FLUX_TASK_RANK"],
        beside: &[],
        rank: &["FLUX_TASK_RANK"],
        ranks: &["FLUX_JOB_SIZE"],
        local_rank: &["FLUX_TASK_LOCAL_ID"],
        local_ranks: &[],
    },
    Marks {
        kind: Kind::Mpi,
        name: "mpiexec (PALS)",
        told_by: &["PALS_RANKID"],
        beside: &[],
        rank: &["PALS_RANKID"],
        ranks: &["PMI_SIZE"],
        local_rank: &["PALS_LOCAL_RANKID"],
        local_ranks: &["PALS_LOCAL_SIZE"],
    },
];

pub(in crate::comm) const MPIRUN: &str = "mpirun";

pub(super) const SRUN: Marks = Marks {
    kind: Kind::Srun,
    name: "srun",
    told_by: &["SLURM_PROCID"],
    beside: &[],
    rank: &["SLURM_PROCID"],
    ranks: SLURM_TASKS,
    local_rank: &["SLURM_LOCALID"],
    local_ranks: &[],
};

pub(super) const TORCHRUN: Marks = Marks {
    kind: Kind::Variables,
    name: "torchrun",
    told_by: &["RANK", "WORLD_SIZE"],
    beside: &[],
    rank: &["RANK"],
    ranks: &["WORLD_SIZE"],
    local_rank: &["LOCAL_RANK"],
    local_ranks: &["LOCAL_WORLD_SIZE"],
};

/// A number in the environment.
#[derive(Clone, Copy)]
pub(super) struct Told {
    variable: &'static str,
    pub number: usize,
}

/// The first of the variables that is set.
///
/// # Errors
/// It is not a whole number.
pub(super) fn told(variables: &Variables, names: &[&'static str]) -> Result<Option<Told>> {
    let Some((variable, text)) = names.iter().find_map(|&name| Some((name, variables.get(name)?))) else {
        return Ok(None);
    };
    match text.trim().parse() {
        Ok(number) => Ok(Some(Told { variable, number })),
        Err(_) => Err(Error::Usage(format!(
            "{variable} is {text:?}; it must be a whole number, set by what starts the ranks: correct it, or unset it to \
             start one rank"
        ))),
    }
}

/// Refuses a rank that is not one of the ranks.
fn check_among(rank: Option<Told>, ranks: Option<Told>) -> Result<()> {
    match (rank, ranks) {
        (Some(rank), Some(ranks)) if rank.number >= ranks.number => Err(Error::Usage(format!(
            "{} is {}, but {} is {}: ranks are numbered from 0 and below the number of ranks; correct what starts them",
            rank.variable, rank.number, ranks.variable, ranks.number
        ))),
        _ => Ok(()),
    }
}

impl Marks {
    fn are_in(&self, variables: &Variables) -> bool {
        let is_set = |name: &&str| variables.contains_key(*name);
        self.told_by.iter().any(is_set) && self.beside.iter().all(is_set)
    }

    /// The launcher, if these are its marks.
    ///
    /// # Errors
    /// A number that is none, or a rank that is not one of the ranks.
    pub fn find(&self, variables: &Variables) -> Result<Option<Launcher>> {
        if !self.are_in(variables) {
            return Ok(None);
        }
        let (rank, ranks) = (told(variables, self.rank)?, told(variables, self.ranks)?);
        let (local_rank, local_ranks) = (told(variables, self.local_rank)?, told(variables, self.local_ranks)?);
        check_among(rank, ranks)?;
        check_among(local_rank, local_ranks)?;
        let number = |told: Option<Told>| told.map(|told| told.number);
        Ok(Some(Launcher {
            kind: self.kind,
            name: self.name,
            rank: number(rank).unwrap_or(0),
            ranks: number(ranks),
            local_rank: number(local_rank),
            local_ranks: number(local_ranks),
        }))
    }
}
