//! How a job ends when one of its ranks does: soon, all with one exit code, with a word on who and why.

use super::{Ranks, finish};
use crate::common::{Output, event};
use candle_core::{Device, Tensor};
use flowrl_dist::comm::{Backend, Call, Launch, ReduceOp, World, phase};
use flowrl_dist::error::{EXIT_FAILED, EXIT_RESTART};
use flowrl_dist::{Error, Result};
use signal_hook::consts::{SIGKILL, SIGSTOP};
use signal_hook::low_level::raise;
use std::fs::File;
use std::time::Duration;

/// Of jobs that end at the deadline, and how long after it.
const DEADLINE: Duration = Duration::from_secs(3);
const AFTER: Duration = Duration::from_secs(5);

/// Until when the ranks of a job have to come that stays incomplete: time for those that do come.
const COMING: Duration = Duration::from_secs(10);

/// Of all others: they end long before it, even on a busy machine.
const FAR: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);

/// The role in a job that some ranks do not come to.
pub const INCOMPLETE: &str = "incomplete";

/// The role in a job whose rank opens all the files that it may, as soon as it waits for the others.
pub const GREEDY: &str = "greedy";

/// The numbers of the collectives below: two before them tell who is where, and those of the other plane do not count.
const SECOND: &str = "all_reduce #4 of the host plane";
const THIRD: &str = "all_reduce #5 of the host plane";

/// Two collectives that all join, then the last rank does what its role says while the others wait in the third.
pub fn rank(role: &str) -> Result<()> {
    let deadline = match role {
        INCOMPLETE | GREEDY => COMING,
        "sleep" | "stop" | "stop0" => DEADLINE,
        _ => FAR,
    };
    if role == GREEDY {
        std::thread::spawn(open_all_files);
    }
    let world = World::from_environment(&Launch::new(Backend::Tcp, deadline))?;
    match act(&world, role) {
        Err(e) => world.abort(e.exit_code(), &e.to_string()),
        Ok(()) => Ok(()),
    }
}

fn open_all_files() {
    std::thread::sleep(Duration::from_millis(500));
    let files: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    std::thread::sleep(FAR);
    drop(files);
}

fn act(world: &World, role: &str) -> Result<()> {
    phase("rollout");
    let beside = world.device.begin(Call::AllReduce(ReduceOp::Sum), &Tensor::new(&[1f32], &Device::Cpu)?)?;
    join(world, 2)?;
    beside.wait()?;
    join(world, 2)?;
    let actor = if role.ends_with("0") { 0 } else { world.world_size() - 1 };
    if world.rank() == actor {
        event();
        match role.trim_end_matches('0') {
            "panic" => panic!("had enough"),
            "error" => return Err(Error::Failed("cannot go on".into())),
            "sleep" => std::thread::sleep(Duration::from_secs(600)),
            "stop" => raise(SIGSTOP).unwrap(),
            "kill" => raise(SIGKILL).unwrap(),
            "success" => world.abort(0, "nothing is left to do"),
            "wrapped" => world.abort(256, "nothing is left to do"),
            "exit" => std::process::exit(0),
            "return" => return Ok(()),
            "other length" => return join(world, 3),
            "other call" => return world.host.barrier(),
            _ => panic!("no role {role}"),
        }
    }
    phase("update");
    join(world, 2)
}

fn join(world: &World, length: usize) -> Result<()> {
    world.host.all_reduce(&Tensor::new(vec![1f32; length], &Device::Cpu)?, ReduceOp::Sum).map(|_| ())
}

/// All ranks but the actor end within `limit` of the event with `code`, and one of them says all of `words`; prints how soon
/// the last one does.
fn ends(role: &str, limit: Duration, code: i32, words: &[&str]) {
    let ranks = Ranks::new(3, role);
    let mut jobs = ranks.start_all();
    let actor = if role.ends_with('0') { 0 } else { 2 };
    let acting = jobs.remove(actor);
    let outputs = finish(jobs);
    acting.signal("KILL"); // one that hangs or is stopped
    let acting = acting.finish(super::TIMEOUT);
    let said: String = outputs.iter().chain([&acting]).map(|output| output.stderr.as_str()).collect();
    for word in words {
        assert!(said.contains(word), "{role}: no {word:?} in\n{said}");
    }
    let last = outputs.iter().map(|output| since(&acting, output)).max().unwrap().as_secs_f64();
    println!("TCP, {} ranks, {role:>12}: over after {last:5.2} s, exit code {code}", ranks.ranks);
    for output in &outputs {
        assert_eq!(output.code(), code, "{role}: {output}");
        assert!(since(&acting, output) < limit, "{role}: {:?} after the event: {output}", since(&acting, output));
    }
}

/// Time between the actor's event and the end of another rank.
fn since(actor: &Output, other: &Output) -> Duration {
    let later = other.ended.duration_since(actor.ended).unwrap_or_default();
    let earlier = actor.ended.duration_since(other.ended).unwrap_or_default();
    (actor.since_event() + later).saturating_sub(earlier)
}

#[test]
fn a_rank_that_fails_ends_all_with_its_exit_code() {
    ends("error", SOON, EXIT_FAILED, &["rank 2 on ", ": cannot go on", "ended the job with exit code 1"]);
    ends("error0", SOON, EXIT_FAILED, &["rank 0 on ", ": cannot go on"]);
    ends("panic", SOON, 101, &["panicked at tests/ranks/tcp/failures.rs", "had enough", SECOND, "in phase rollout"]);
}

/// Whatever code it gives, the job is not done.
#[test]
fn a_rank_that_ends_the_job_does_not_end_it_well() {
    for role in ["success", "wrapped"] {
        ends(role, SOON, EXIT_FAILED, &[": nothing is left to do", "ended the job with exit code 1"]);
    }
}

#[test]
fn a_rank_that_is_gone_ends_all() {
    ends("kill", SOON, EXIT_RESTART, &["rank 0 on ", ": rank 2 on ", " is gone"]);
    ends("kill0", SOON, EXIT_RESTART, &[": rank 0 on ", " is gone"]);
    ends("exit", SOON, EXIT_RESTART, &[": rank 2 on ", " is gone"]);
    ends("return", SOON, EXIT_RESTART, &[THIRD, "the connection to rank 2 on ", " is lost"]);
}

#[test]
fn a_rank_that_does_not_come_ends_all_at_the_deadline() {
    let limit = DEADLINE + AFTER;
    let words = [THIRD, "rank 2 on ", " did not come within the deadline of 3 s"];
    ends("sleep", limit, EXIT_RESTART, &words);
    ends("stop", limit, EXIT_RESTART, &["rank 2 on "]);
    ends("stop0", limit, EXIT_RESTART, &["rank 0 on "]);
}

#[test]
fn ranks_out_of_step_are_told() {
    ends("other length", SOON, EXIT_FAILED, &["ranks are out of step in ", THIRD, "rank 2 on "]);
    ends("other call", SOON, EXIT_FAILED, &["ranks are out of step in ", THIRD]);
}
