//! Who is let in, and what becomes of a job that is not complete.

use super::failures::{GREEDY, INCOMPLETE};
use super::{Ranks, TIMEOUT, finish};
use crate::common::Output;
use flowrl_dist::error::{EXIT_FAILED, EXIT_RESTART, EXIT_USAGE};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Connects as soon as rank 0 listens.
fn stranger(port: u16) -> TcpStream {
    let end = Instant::now() + TIMEOUT;
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(e) => assert!(Instant::now() < end, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn refused(output: &Output, code: i32, word: &str) {
    assert_eq!(output.code(), code, "{output}");
    assert!(output.stderr.contains(word), "no {word:?}: {output}");
}

#[test]
fn strangers_do_not_disturb_the_ranks() {
    let ranks = Ranks::new(2, "conform");
    let first = ranks.start(0, &[]);
    let mut silent = stranger(ranks.port);
    let mut browser = stranger(ranks.port);
    browser.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
    let mut garbage = stranger(ranks.port);
    garbage.write_all(&[0xff; 4096]).unwrap();
    let mut half = stranger(ranks.port);
    half.write_all(b"flow").unwrap();
    drop(half);
    let second = ranks.start(1, &[]);
    for output in finish(vec![first, second]) {
        let output = output.success();
        if output.stdout.contains("rank 0") {
            assert!(output.stderr.matches("refused a connection from ").count() <= 8, "{output}");
        }
    }
    // Each was given the challenge and nothing else.
    for stranger in [&mut silent, &mut browser, &mut garbage] {
        let mut heard = Vec::new();
        let _ = stranger.read_to_end(&mut heard);
        assert!(heard.len() <= 44, "{heard:?}");
    }
}

#[test]
fn a_rank_with_another_word_is_refused() {
    let ranks = Ranks::new(2, "conform");
    let first = ranks.start(0, &[]);
    let wrong = ranks.start(1, &[("FLOWRL_TOKEN", "another word")]).finish(TIMEOUT);
    refused(&wrong, EXIT_USAGE, "FLOWRL_TOKEN is not the same on all ranks");
    // One of an earlier start of the job.
    let old = ranks.start(1, &[("SLURM_RESTART_COUNT", "1")]).finish(TIMEOUT);
    refused(&old, EXIT_USAGE, "does not let rank 1 in");
    // Its place is still free.
    let second = ranks.start(1, &[]);
    finish(vec![first, second]).into_iter().for_each(|output| drop(output.success()));
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let ranks = Ranks::new(5, INCOMPLETE);
    let alone = Ranks::new(2, INCOMPLETE).start(1, &[]);
    let outputs = finish([0, 1, 3].map(|rank| ranks.start(rank, &[])).into());
    refused(&outputs[0], EXIT_RESTART, "ranks 2, 4 of 5 did not come to 127.0.0.1, port ");
    refused(&outputs[1], EXIT_RESTART, "not all ranks came");
    refused(&outputs[2], EXIT_RESTART, "not all ranks came");
    refused(&alone.finish(TIMEOUT), EXIT_RESTART, "rank 0 was not at 127.0.0.1, port ");
}

#[test]
fn a_second_rank_of_one_number_and_one_of_another_size_are_refused() {
    let ranks = Ranks::new(3, "conform");
    let first = ranks.start(0, &[]);
    // Whichever of these comes first is rank 1.
    let mut twins = vec![ranks.start(1, &[]), ranks.start(1, &[])];
    let end = Instant::now() + TIMEOUT;
    let later = loop {
        match twins.iter_mut().position(|twin| !twin.is_running()) {
            Some(later) => break twins.remove(later),
            None => assert!(Instant::now() < end, "two are rank 1"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    refused(&later.finish(TIMEOUT), EXIT_USAGE, "rank 1 is here already");
    let other = ranks.start(2, &[("WORLD_SIZE", "4")]).finish(TIMEOUT);
    refused(&other, EXIT_USAGE, "was started as one of 4 ranks, rank 0 as one of 3");
    let third = ranks.start(2, &[]);
    twins.extend([first, third]);
    finish(twins).into_iter().for_each(|output| drop(output.success()));
}

#[test]
fn a_port_that_is_taken_is_told() {
    let ranks = Ranks::new(2, INCOMPLETE);
    let _taken = std::net::TcpListener::bind(("::", ranks.port)).unwrap();
    refused(&ranks.start(0, &[]).finish(TIMEOUT), EXIT_USAGE, "set MASTER_PORT to a free port");
    refused(&ranks.start(1, &[]).finish(TIMEOUT), EXIT_RESTART, "rank 0 was not at");
}

/// Long before the deadline of a run.
const SOON: Duration = Duration::from_secs(20);

/// The program on a configuration that stands in one of two folders, which are two hosts without a common file system.
struct Hosts {
    with: tempfile::TempDir,
    without: tempfile::TempDir,
}

impl Hosts {
    fn new() -> Self {
        let [with, without] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let out = with.path().join("run");
        let text = format!("run.out = {out:?}\nparallel.backend = \"tcp\"\n[[reward]]\nname = \"ocr\"\n");
        std::fs::write(with.path().join("run.toml"), text).unwrap();
        Self { with, without }
    }
}

const COMMAND: [&str; 2] = ["--config", "run.toml"];

/// Neither ranks that wait for one without its files, nor such a one that the others wait for.
#[test]
fn a_rank_that_cannot_begin_ends_all_at_once() {
    let hosts = Hosts::new();
    for failing in [0, 1] {
        let ranks = Ranks::new(3, "");
        let folder = |rank| if rank == failing { hosts.without.path() } else { hosts.with.path() };
        let since = Instant::now();
        let outputs = finish((0..3).map(|rank| ranks.start_program(rank, folder(rank), &COMMAND)).collect());
        assert!(since.elapsed() < SOON, "{:?}", since.elapsed());
        refused(&outputs[0], EXIT_USAGE, "run.toml: cannot be read");
        assert_eq!(outputs[0].stderr.contains("rank 1 on "), failing == 1, "{}", outputs[0]);
        for output in &outputs[1..] {
            assert_eq!((output.code(), output.stderr.as_str()), (EXIT_USAGE, ""), "rank 0 says it: {output}");
        }
    }
}

#[test]
fn two_jobs_on_one_port_do_not_mix() {
    let (hosts, ranks) = (Hosts::new(), Ranks::new(2, ""));
    let ours = ranks.start_program(0, hosts.with.path(), &COMMAND);
    let other = [&COMMAND[..], &["--set", "run.seed=2"]].concat();
    let theirs = ranks.start_program(1, hosts.with.path(), &other).finish(TIMEOUT);
    refused(&theirs, EXIT_USAGE, "rank 1 on ");
    refused(&theirs, EXIT_USAGE, " is of another job (command ");
    // One whose configuration cannot be read is of the other job all the same, and does not end this one.
    let theirs = ranks.start_program(1, hosts.without.path(), &other).finish(TIMEOUT);
    refused(&theirs, EXIT_USAGE, "run.toml: cannot be read");
    // This job's own rank 1 is let in.
    let mine = ranks.start_program(1, hosts.without.path(), &COMMAND).finish(TIMEOUT);
    refused(&mine, EXIT_USAGE, "");
    let ours = ours.finish(TIMEOUT);
    refused(&ours, EXIT_USAGE, "cannot begin: run.toml");
    refused(&ours, EXIT_USAGE, " is of another job (command ");
}

/// Where the launcher numbers its jobs, a rank that knows the key and was started for something else is a mistake.
#[test]
fn ranks_of_one_job_that_were_started_differently_end_at_once() {
    let (hosts, ranks) = (Hosts::new(), Ranks::new(3, ""));
    let run_id = [("TORCHELASTIC_RUN_ID", "7")];
    let start = |rank, set: &str| {
        let arguments = [&COMMAND[..], &["--set", set]].concat();
        ranks.start_program_with(rank, hosts.with.path(), &arguments, &run_id)
    };
    let since = Instant::now();
    let outputs = finish(vec![start(0, "run.seed=1"), start(1, "run.seed=2"), start(2, "run.seed=1")]);
    assert!(since.elapsed() < SOON, "{:?}", since.elapsed());
    for output in &outputs[..2] {
        refused(output, EXIT_USAGE, "rank 1 on ");
        refused(output, EXIT_USAGE, " was started with another command and another configuration (command ");
        refused(output, EXIT_USAGE, ") than rank 0 on ");
    }
    refused(&outputs[2], EXIT_USAGE, "ranks were started differently; see its message");
}

#[test]
fn open_files_are_provided_for() {
    let ranks = Ranks::new(3, "conform");
    let first = ranks.start_limited(0, "ulimit -Sn 8", &[]);
    let jobs = [first, ranks.start(1, &[]), ranks.start(2, &[])];
    finish(jobs.into()).into_iter().for_each(|output| drop(output.success()));
    let many = Ranks::new(64, INCOMPLETE).start_limited(0, "ulimit -n 200", &[]).finish(TIMEOUT);
    refused(&many, EXIT_USAGE, "63 other ranks over TCP need ");
    refused(&many, EXIT_USAGE, "of which its limit allows 200: raise it");
    assert!(many.elapsed < SOON, "{many}");
}

#[test]
fn a_rank_without_open_files_says_so_at_once() {
    let ranks = Ranks::new(2, GREEDY);
    let lonely = Ranks::new(2, GREEDY).start_limited(1, "ulimit -n 200", &[]);
    let mut first = ranks.start_limited(0, "ulimit -n 200", &[]);
    let mut strangers = Vec::new();
    while first.is_running() {
        strangers.extend(TcpStream::connect(("127.0.0.1", ranks.port)));
        std::thread::sleep(Duration::from_millis(100));
    }
    for output in [first.finish(TIMEOUT), lonely.finish(TIMEOUT)] {
        refused(&output, EXIT_FAILED, "can be opened: Too many open files");
        assert!(!output.stderr.contains("firewall"), "{output}");
    }
}
