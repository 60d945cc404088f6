//! Signals that ask the run to save and leave: SIGUSR1 (a batch system's warning), SIGTERM, SIGINT, and SIGHUP, which a
//! terminal sends when it is closed.

use crate::comm::{ReduceOp, World};
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Exit code of a second SIGINT, as a shell has it: 128 + 2.
const EXIT_INTERRUPTED: i32 = 130;

/// Whether a signal asked this process to leave.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Catches the signals from now on; the first of each kind is answered at once, with its name, on a thread of its own. A
    /// second SIGINT ends the process at once with code 130. A SIGHUP that is ignored stays so: that is what nohup asks for.
    pub fn install(answer: impl Fn(&'static str) + Send + 'static) -> Result<Self> {
        let failed = |e: std::io::Error| Error::Failed(format!("signals cannot be caught: {e}"));
        let signal = Arc::new(AtomicUsize::new(0));
        let interrupted = Arc::new(AtomicBool::new(false));
        // Handlers run in the order of their registration: the first SIGINT finds the flag unset and sets it.
        flag::register_conditional_shutdown(SIGINT, EXIT_INTERRUPTED, interrupted.clone()).map_err(failed)?;
        flag::register(SIGINT, interrupted).map_err(failed)?;
        let mut caught = vec![SIGUSR1, SIGTERM, SIGINT];
        if !is_ignored(SIGHUP) {
            caught.push(SIGHUP);
        }
        for &number in &caught {
            flag::register_usize(number, signal.clone(), number as usize).map_err(failed)?;
        }
        let mut signals = Signals::new(caught).map_err(failed)?;
        let answer_all = move || {
            let mut answered = BTreeSet::new();
            for number in signals.forever() {
                if answered.insert(number) {
                    name(number).into_iter().for_each(&answer);
                }
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(answer_all).map_err(failed)?;
        Ok(Self { signal })
    }

    /// The signal that came last on this rank.
    pub fn requested(&self) -> Option<&'static str> {
        name(self.signal.load(Ordering::SeqCst) as i32)
    }

    /// Whether a signal came on any rank: a collective, the same answer on all ranks, so that they leave at the same
    /// point of the run.
    pub fn agreed(&self, world: &World) -> Result<bool> {
        let mine = u32::from(self.requested().is_some());
        let any = world.host.all_reduce(&Tensor::new(&[mine], &Device::Cpu)?, ReduceOp::Max)?; // [1]
        Ok(any.to_vec1::<u32>()? == [1])
    }
}

fn name(number: i32) -> Option<&'static str> {
    match number {
        SIGUSR1 => Some("SIGUSR1"),
        SIGTERM => Some("SIGTERM"),
        SIGINT => Some("SIGINT"),
        SIGHUP => Some("SIGHUP"),
        _ => None,
    }
}

/// Whether this process was started to ignore a signal.
fn is_ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (number - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::low_level::raise;

    #[test]
    fn signals_are_caught_and_named() {
        let (told, tell) = std::sync::mpsc::channel();
        let interrupt = Interrupt::install(move |signal| told.send(signal).unwrap()).unwrap();
        let world = World::solo();
        assert_eq!(interrupt.requested(), None);
        assert!(!interrupt.agreed(&world).unwrap());
        for (signal, name) in [(SIGUSR1, "SIGUSR1"), (SIGTERM, "SIGTERM"), (SIGINT, "SIGINT"), (SIGHUP, "SIGHUP")] {
            raise(signal).unwrap();
            assert_eq!(tell.recv_timeout(std::time::Duration::from_secs(60)), Ok(name));
            assert_eq!(interrupt.requested(), Some(name));
            assert!(interrupt.agreed(&world).unwrap());
        }
    }
}
