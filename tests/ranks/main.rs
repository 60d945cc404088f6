//! Ranks: how they are launched, find each other, work together and fail.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test ends where something is wrong")]

#[path = "../common/mod.rs"]
mod common;

mod conformance;
#[cfg(feature = "mpi")]
mod mpi_conformance;
#[cfg(feature = "mpi")]
mod mpi_failures;
mod mpi_launch;
mod tcp;
