//! The program as a user meets it: its commands, its folders, its servers.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test ends where something is wrong")]

#[path = "../common/mod.rs"]
mod common;

mod checkpoint;
mod cli;
mod cli_sample;
mod export;
mod observe;
mod observe_compare;
mod observe_report;
mod reward_remote;
#[cfg(feature = "mpi")]
mod sd35;
