//! Ranks that meet over TCP: the suite of all communicators, and how a job ends whose ranks fail, are missing, or are none
//! of it. This program starts itself again as the ranks.

mod failures;
mod meeting;

use crate::common::{Job, Output, ROLE, test_of};
use flowrl_dist::Result;
use flowrl_dist::comm::testing::conformance;
use flowrl_dist::comm::{Backend, Launch, World};
use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::Path;
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
    let world = World::from_environment(&Launch::new(Backend::Tcp, Duration::from_secs(60)))?;
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
        self.start_limited(rank, "ulimit -n", variables)
    }

    /// The same after a command of the shell, such as `ulimit`.
    fn start_limited(&self, rank: usize, limit: &str, variables: &[(&str, &str)]) -> Job {
        let mut command = Command::new("bash");
        command
            .args(["-c", &format!("{limit} >/dev/null && exec \"$0\" \"$@\"")])
            .arg(std::env::current_exe().unwrap())
            .args([&test_of(module_path!(), "worker"), "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, &self.role)
            .envs(variables.iter().copied());
        Job::start(self.place(rank, &mut command))
    }

    /// Starts the program itself as one of them.
    fn start_program(&self, rank: usize, folder: &Path, arguments: &[&str]) -> Job {
        self.start_program_with(rank, folder, arguments, &[])
    }

    /// The same with further variables.
    fn start_program_with(&self, rank: usize, folder: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Job {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowrl-dist"));
        command.args(arguments).current_dir(folder).envs(variables.iter().copied());
        Job::start(self.place(rank, &mut command))
    }

    /// Tells a process which rank it is, unless it is told already.
    fn place<'a>(&self, rank: usize, command: &'a mut Command) -> &'a mut Command {
        let (rank, ranks, port) = (rank.to_string(), self.ranks.to_string(), self.port.to_string());
        let variables = [
            ("RANK", rank.as_str()),
            ("WORLD_SIZE", &ranks),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", &port),
            ("FLOWRL_TOKEN", "the tests' word"),
        ];
        for (name, value) in variables {
            if command.get_envs().all(|(set, _)| set != name) {
                command.env(name, value);
            }
        }
        command
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
