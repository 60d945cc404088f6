//! How a job ends when one of its ranks does: soon, with the right code, with a word on who and why, and wholly.

use crate::common::{ROLE, event, workers};
use candle_core::{Device, Tensor};
use flowrl_dist::comm::{Backend, Launch, ReduceOp, World, phase};
use flowrl_dist::error::{EXIT_FAILED, EXIT_RESTART};
use flowrl_dist::interrupt::Interrupt;
use flowrl_dist::{Error, Result};
use signal_hook::consts::{SIGKILL, SIGSTOP, SIGUSR1};
use signal_hook::low_level::raise;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(120);
const EXIT_PANIC: i32 = 101;

/// Of jobs that end at the deadline, and how long after it.
const DEADLINE: Duration = Duration::from_secs(2);
const AFTER: Duration = Duration::from_secs(5);

/// Of all others: they end long before it, even on a busy machine.
const FAR: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);

/// One rank; does nothing in the run of the tests themselves.
#[test]
fn worker() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let deadline = if ["sleep", "stop", "return"].contains(&role.as_str()) { DEADLINE } else { FAR };
    let world = World::from_environment(&Launch::new(Backend::Auto, deadline)).unwrap();
    if let Err(e) = rank(&world, &role) {
        world.abort(e.exit_code(), &e.to_string());
    }
}

/// The numbers of the collectives below: two before them tell who is where.
const SECOND: &str = "last collective: all_reduce #4 of the host plane";
const THIRD: &str = "last collective: all_reduce #5 of the host plane";

/// Two collectives that all join, then rank 1 does what its role says while the others wait in the third.
fn rank(world: &World, role: &str) -> Result<()> {
    phase("rollout");
    join(world)?;
    join(world)?;
    if role == "interrupt" {
        return leave_together(world);
    }
    if world.rank() == 1 {
        event();
        match role {
            "panic" => panic!("rank 1 has had enough"),
            "panic on a thread" => std::thread::spawn(|| panic!("a helper fell")).join().unwrap(),
            "success" => world.abort(0, "nothing is left to do"),
            "error" => return Err(Error::Failed("rank 1 cannot go on".into())),
            "sleep" => std::thread::sleep(TIMEOUT),
            "stop" => raise(SIGSTOP).unwrap(),
            "kill" => raise(SIGKILL).unwrap(),
            "return" => return Ok(()),
            _ => panic!("no role {role}"),
        }
    }
    phase("update");
    join(world)
}

fn join(world: &World) -> Result<()> {
    world.host.all_reduce(&Tensor::new(&[1f32, 2.0], &Device::Cpu)?, ReduceOp::Sum).map(|_| ())
}

/// Only rank 1 gets the signal; all leave at the same iteration.
fn leave_together(world: &World) -> Result<()> {
    let interrupt = Interrupt::install(|_| ())?;
    for iteration in 0.. {
        if world.rank() == 1 && iteration == 5 {
            raise(SIGUSR1).unwrap();
        }
        if interrupt.agreed(world)? {
            println!("LEFT AT {iteration} BY {:?}", interrupt.requested());
            break;
        }
    }
    Ok(())
}

/// A job of so many ranks, of which rank 1 does what its role says, is over within `limit` of that, with `code`, all of
/// `words` on stderr and no process left; prints how soon.
fn ends(ranks: usize, role: &str, limit: Duration, code: i32, words: &[&str]) {
    let output = workers(module_path!(), ranks, role, TIMEOUT);
    // Open MPI 4.1's mpirun may crash in its own end, after all ranks are gone: then the code stands in what it printed.
    match output.stderr.contains("PMIx_server_finalize") {
        true => assert!(output.stderr.contains(&format!("with errorcode {code}.")), "{output}"),
        false => assert_eq!(output.code(), code, "{output}"),
    }
    for word in words {
        assert!(output.stderr.contains(word), "no {word:?}: {output}");
    }
    let seconds = output.since_event().as_secs_f64();
    println!("MPI, {ranks} ranks, {role:>17}: over after {seconds:5.2} s, exit code {code}");
    assert!(output.since_event() < limit, "{seconds} s after the event: {output}");
    output.assert_no_leftovers();
}

#[test]
fn a_panic_ends_the_job() {
    let words = ["rank 1 on ", "panicked at tests/ranks/mpi_failures.rs", "rank 1 has had enough", "in phase rollout"];
    ends(2, "panic", SOON, EXIT_PANIC, &words);
    let words = ["rank 1 on ", "a helper fell", SECOND];
    ends(3, "panic on a thread", SOON, EXIT_PANIC, &words);
}

#[test]
fn an_error_ends_the_job_with_its_code() {
    ends(2, "error", SOON, EXIT_FAILED, &["rank 1 on ", ": rank 1 cannot go on"]);
    // None says that the job is done.
    ends(2, "success", SOON, EXIT_FAILED, &["rank 1 on ", ": nothing is left to do"]);
}

#[test]
fn a_rank_that_does_not_come_ends_the_job_at_the_deadline() {
    let words = ["rank 0 on ", THIRD, "in phase update", "the deadline of 2 s"];
    ends(2, "sleep", DEADLINE + AFTER, EXIT_RESTART, &words);
    ends(3, "stop", DEADLINE + AFTER, EXIT_RESTART, &words);
    ends(2, "return", DEADLINE + AFTER, EXIT_RESTART, &["last collective: ", "the deadline of 2 s"]);
}

#[test]
fn a_killed_rank_ends_the_job() {
    ends(2, "kill", SOON, 128 + SIGKILL, &[]);
}

#[test]
fn a_signal_to_one_rank_makes_all_leave_together() {
    let output = workers(module_path!(), 3, "interrupt", TIMEOUT).success();
    let left = output.stdout.lines().filter_map(|line| line.split_once("LEFT AT ")).collect::<Vec<_>>();
    assert_eq!(left.len(), 3, "{output}");
    assert!(left.iter().all(|(_, rest)| rest.starts_with("5 BY ")), "{output}");
    assert_eq!(left.iter().filter(|(_, rest)| rest.starts_with("5 BY Some(\"SIGUSR1\")")).count(), 1, "{output}");
    output.assert_no_leftovers();
}
