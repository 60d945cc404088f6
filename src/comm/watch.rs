//! What this process was doing, told when it dies; and the deadline that no collective outlives.
//!
//! The state is a global because those who tell it, the panic hook and the watchdog thread, hold no [`super::World`],
//! and because one process is one rank.

use super::plane::Collective;
use crate::error::{EXIT_RESTART, Error, Result};
use crate::plain;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Rank 0 waits this long between printing its message and ending the job, so that other late ranks can print theirs; each
/// further rank waits once more, so that only one ends the job: Open MPI 4.1's mpirun may crash when several do at once.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// No rank waits more often than this.
const LONGEST: usize = 5;

/// A process that panics exits with this code, as any Rust program does.
const EXIT_PANIC: i32 = 101;

/// Whether a panic of this process has to end its peers.
static ARMED: AtomicBool = AtomicBool::new(false);

struct State {
    who: String,
    rank: usize,
    phase: &'static str,
    /// The collective that began last.
    last: Option<Collective>,
    /// Those that have begun and not ended, on whatever thread, oldest first: with the ticket of its guard, and its beginning.
    waiting: Vec<(Collective, u64, Instant)>,
    /// Guards given out so far.
    tickets: u64,
}

static STATE: Mutex<State> =
    Mutex::new(State { who: String::new(), rank: 0, phase: "start", last: None, waiting: Vec::new(), tickets: 0 });

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names what the run does now ("sample", "train", ...), for the message that tells where it died.
pub fn phase(name: &'static str) {
    state().phase = name;
}

/// `rank 1 on node7: MESSAGE`, one line.
pub(super) fn signed(message: &str) -> String {
    match state().who.as_str() {
        "" => plain::line(message).into_owned(),
        who => plain::line(&format!("{who}: {message}")).into_owned(),
    }
}

impl State {
    fn last(&self) -> String {
        let phase = self.phase;
        match self.waiting.first().map(|&(collective, ..)| collective).or(self.last) {
            None => format!("no collective yet, in phase {phase}"),
            Some(collective) => format!("last collective: {collective} in phase {phase}"),
        }
    }
}

/// Says who this process is: "rank 1 on node7".
pub(super) fn name_self(rank: Option<usize>, host: &str) {
    let mut state = state();
    state.rank = rank.unwrap_or(0);
    state.who = match rank {
        Some(rank) => format!("rank {rank} on {host}"),
        None => format!("a rank that is still starting on {host}"),
    };
}

/// A collective that has begun and not ended; holds its ticket.
pub(super) struct Waiting(u64);

impl Drop for Waiting {
    fn drop(&mut self) {
        state().waiting.retain(|&(_, ticket, _)| ticket != self.0);
    }
}

/// Registers a collective; the deadline runs until the guard is dropped.
pub(super) fn waiting(collective: Collective) -> Waiting {
    let mut state = state();
    state.last = Some(collective);
    state.tickets += 1;
    let ticket = state.tickets;
    state.waiting.push((collective, ticket, Instant::now()));
    Waiting(ticket)
}

/// From now on a panic or a collective older than `deadline` prints the state and calls `abort`.
pub(super) fn arm(deadline: Duration, abort: fn(i32) -> !) -> Result<()> {
    ARMED.store(true, Ordering::SeqCst);
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !ARMED.load(Ordering::SeqCst) {
            return previous(info);
        }
        tell_panic(info);
        // Unwinding would reach MPI_Finalize, which waits for peers that wait for us.
        abort(EXIT_PANIC)
    }));
    std::thread::Builder::new()
        .name("watchdog".into())
        .spawn(move || watch(deadline, abort))
        .map_err(|e| Error::Failed(format!("the watchdog thread could not be started: {e}")))?;
    Ok(())
}

/// The same, where nothing has armed it yet.
#[cfg(feature = "cuda")]
pub(super) fn arm_once(rank: usize, deadline: Duration, abort: fn(i32) -> !) -> Result<()> {
    if ARMED.load(Ordering::SeqCst) {
        return Ok(());
    }
    name_self(Some(rank), &crate::hostname::hostname());
    arm(deadline, abort)
}

/// `MESSAGE; last collective: all_reduce #7 of the device plane in phase update`.
#[cfg(feature = "cuda")]
pub(super) fn at_last(message: &str) -> String {
    format!("{message}; {}", state().last())
}

/// The peers are no longer concerned: panics are this process's own, and nothing waits for others.
pub(super) fn disarm() {
    ARMED.store(false, Ordering::SeqCst);
}

fn tell_panic(info: &PanicHookInfo) {
    let place = info.location().map(|l| l.to_string()).unwrap_or_default();
    let cause = info.payload_as_str().unwrap_or("(no message)");
    let last = state().last();
    eprintln!("{}", signed(&format!("panicked at {place}: {cause}; {last}")));
    let trace = Backtrace::capture();
    if trace.status() == BacktraceStatus::Captured {
        eprintln!("{trace}");
    }
}

fn watch(deadline: Duration, abort: fn(i32) -> !) {
    let tick = (deadline / 20).clamp(Duration::from_millis(10), Duration::from_millis(500));
    while ARMED.load(Ordering::SeqCst) {
        std::thread::sleep(tick);
        let late = {
            let state = state();
            state.waiting.first().is_some_and(|(_, _, since)| since.elapsed() > deadline).then(|| state.last())
        };
        if let Some(late) = late {
            let seconds = deadline.as_secs_f64();
            eprintln!(
                "{}",
                signed(&format!(
                    "{late} has waited longer than the deadline of {seconds} s: a peer is gone or \
                     hangs (most likely one that does not print this line). Start the run again: it resumes from \
                     the newest complete checkpoint"
                ))
            );
            let turns = (state().rank + 1).min(LONGEST);
            std::thread::sleep(LAST_WORDS * turns as u32);
            abort(EXIT_RESTART)
        }
    }
}
