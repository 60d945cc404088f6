//! Ranks that meet over TCP: the suite of all communicators, and how a job ends whose ranks fail, are missing, or are none
//! of it. This program starts itself again as the ranks.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // helpers of tests

#[path = "../common/mod.rs"]
mod common;

mod failures;
mod meeting;

use common::{Job, Output, ROLE};
use flowrl_dist::Result;
use flowrl_dist::comm::testing::conformance;
use flowrl_dist::comm::{Backend, World};
use std::collections::BTreeSet;
use std::net::TcpListener;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(120);

/// One rank; does nothing in the run of the tests themselves.
#[test]
fn worker() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let outcome = if role == "conform" { conform() } else { failures::rank(&role) };
    if let Err(e) = outcome {
        eprintln!("{e}");
        std::process::exit(e.exit_code());
    }
}

fn conform() -> Result<()> {
    let world = World::from_environment(Backend::Tcp, Duration::from_secs(60))?;
    conformance(&*world.host)?;
    conformance(&*world.device)?;
    println!("WORLD {}", world.describe());
    Ok(())
}

/// The ranks of one job, each a process of this program.
struct Ranks {
    ranks: usize,
    role: String,
    port: u16,
}

impl Ranks {
    fn new(ranks: usize, role: &str) -> Self {
        Self { ranks, role: role.into(), port: free_port() }
    }

    /// Starts one of them, with further variables.
    fn start(&self, rank: usize, variables: &[(&str, &str)]) -> Job {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["worker", "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, &self.role)
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", self.ranks.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", self.port.to_string())
            .env("FLOWRL_TOKEN", "the tests' word")
            .envs(variables.iter().copied());
        Job::start(&mut command)
    }

    fn start_all(&self) -> Vec<Job> {
        (0..self.ranks).map(|rank| self.start(rank, &[])).collect()
    }
}

/// A port that no other job of these tests is given: the kernel may name one again before its ranks listen.
fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        if GIVEN.lock().unwrap().insert(port) {
            return port;
        }
    }
}

/// What all came to.
fn finish(jobs: Vec<Job>) -> Vec<Output> {
    jobs.into_iter().map(|job| job.finish(TIMEOUT)).collect()
}

#[test]
fn tcp_conforms_on_1_2_3_and_5_ranks() {
    for ranks in [2, 3, 5] {
        for output in finish(Ranks::new(ranks, "conform").start_all()) {
            let output = output.success();
            assert!(output.stdout.contains(&format!("WORLD {ranks} ranks on 1 host over TCP (rank 0 at ")), "{output}");
        }
    }
    let alone = finish(Ranks::new(1, "conform").start_all()).remove(0).success();
    assert!(alone.stdout.contains("WORLD 1 rank on 1 host alone"), "{alone}");
}
