//! Faults of a real network between two virtual hosts (launch/hosts-local.sh): a cable that is cut, a host that freezes, one
//! whose processes all die, a rank that is killed. Each ends the job within the deadline and five seconds, with the exit code
//! that asks for a restart, and the restart continues; at the end the run equals the unbroken one, bit for bit. Skipped,
//! with a line that says so, where virtual hosts need privileges that are missing.

mod hosts;

use crate::common::{Job, Output};
use crate::runs::{Record, TIMEOUT, Training};
use flowrl_dist::error::EXIT_RESTART;
use hosts::{Hosts, hosts};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

const SETTINGS: [&str; 7] = [
    "batch.timesteps=1",
    "sampler.steps=2",
    "eval.steps=2",
    "eval.prompts=2",
    "run.eval_every=0",
    "run.checkpoint_every=1",
    "parallel.deadline_s=10",
];
const DEADLINE: Duration = Duration::from_secs(10);

/// Updates for each fault, and after the last: more than pass until one is noticed.
const EACH: u64 = 4;

/// What goes wrong on host b, and how it is put right again.
#[derive(Debug, Clone, Copy)]
enum Fault {
    CableCut,
    HostFrozen,
    HostKilled,
    RankKilled,
}

const FAULTS: [Fault; 4] = [Fault::CableCut, Fault::HostFrozen, Fault::HostKilled, Fault::RankKilled];

impl Fault {
    fn happen(self, hosts: &Hosts) {
        match self {
            Fault::CableCut => hosts.local(&["cut", "b"]),
            Fault::HostFrozen => hosts.local(&["freeze", "b"]),
            Fault::HostKilled => hosts.local(&["kill", "b"]),
            Fault::RankKilled => hosts.local(&["on", "b", "sh", "-c", "kill -KILL $(pgrep -x flowrl-dist)"]),
        };
    }

    fn mend(self, hosts: &Hosts) {
        match self {
            Fault::CableCut => hosts.local(&["heal", "b"]),
            Fault::HostFrozen => hosts.local(&["thaw", "b"]),
            Fault::HostKilled => hosts.local(&["start", "b"]),
            Fault::RankKilled => return,
        };
    }
}

/// The run of 2 ranks that nothing disturbed: the sum of two numbers is the same on any transport.
fn unbroken() -> Arc<Record> {
    static UNBROKEN: OnceLock<Arc<Record>> = OnceLock::new();
    let run = || {
        let training = Training::new(&SETTINGS);
        training.run(2, last());
        Arc::new(training.record())
    };
    UNBROKEN.get_or_init(run).clone()
}

fn last() -> u64 {
    EACH * (FAULTS.len() as u64 + 1)
}

/// Starts the job again after every fault.
fn faults(launcher: &str, start: impl Fn(&Hosts, &[&str]) -> Vec<Command>) {
    let Some(hosts) = hosts() else { return };
    let unbroken = unbroken();
    let training = Training::new(&SETTINGS);
    let command = training.command(1, last());
    let arguments = command.get_args().map(|argument| argument.to_str().unwrap()).collect::<Vec<_>>();
    let launch = || start(&hosts, &arguments).iter_mut().map(Job::start).collect::<Vec<_>>();
    for fault in FAULTS {
        let (saved, launched) = (training.saved().unwrap_or(0), SystemTime::now());
        let mut jobs = launch();
        let begun = Instant::now();
        // Written by this life: the log is cut back to the checkpoint when a run continues.
        let log = training.path("metrics.jsonl");
        let written = || std::fs::metadata(&log).and_then(|data| data.modified()).is_ok_and(|at| at > launched);
        while !(written() && training.newest_logged() > saved) {
            if !jobs[0].is_running() || begun.elapsed() > TIMEOUT {
                panic!("{launcher}: no updates before {fault:?}: {}", jobs.remove(0).finish(Duration::ZERO));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        fault.happen(&hosts);
        let since = Instant::now();
        let output = jobs.remove(0).finish(TIMEOUT);
        let noticed = since.elapsed();
        eprintln!("{launcher}: {fault:?}: exit code {} after {noticed:.1?}: {}", output.code(), reason(&output));
        assert_eq!(output.code(), EXIT_RESTART, "{launcher}: {fault:?}: {output}");
        assert!(noticed < DEADLINE + Duration::from_secs(5), "{launcher}: {fault:?}: {noticed:?}: {output}");
        fault.mend(&hosts);
        hosts.wait_for_end("b");
        jobs.into_iter().for_each(|job| drop(job.finish(TIMEOUT)));
    }
    let outputs = launch().into_iter().map(|job| job.finish(TIMEOUT)).collect::<Vec<_>>();
    outputs.into_iter().for_each(|output| drop(output.success()));
    training.record().assert_equal(&unbroken);
}

/// The first word on what was wrong.
fn reason(output: &Output) -> &str {
    let words =
        ["is gone", "was heard", "deadline", "is lost", "lost communication", "exited on signal", "ended the job"];
    let line = output.stderr.lines().find(|line| words.iter().any(|word| line.contains(word)));
    line.unwrap_or("(no word)").trim()
}

#[test]
fn faults_under_mpirun() {
    faults("mpirun", |hosts, arguments| vec![hosts.mpirun(arguments)]);
}

#[test]
fn faults_over_tcp() {
    faults("TCP", |hosts, arguments| {
        let arguments = [arguments, &["--set", "parallel.backend=tcp"]].concat();
        vec![hosts.rank("a", 0, &arguments), hosts.rank("b", 1, &arguments)]
    });
}
