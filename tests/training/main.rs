//! The invariants of training, on the program itself under mpirun: the number of ranks does not matter, a run that was
//! stopped or killed ends as the unbroken one, and a number that is not finite never reaches the weights.
#![cfg(feature = "mpi")]
#![expect(clippy::unwrap_used, reason = "a test ends where something is wrong")]

#[path = "../common/mod.rs"]
mod common;

mod finite;
mod folder;
mod interruption;
mod network;
mod ranks;
mod resume;
mod rollouts;
mod runs;
mod saving;
mod slurm;
mod stages;
mod stress;
