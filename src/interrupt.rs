//! Signals that ask the run to save and leave: SIGUSR1 (a batch system's warning), SIGTERM and SIGINT.

use crate::comm::{ReduceOp, World};
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Exit code of a second SIGINT, as a shell has it: 128 + 2.
const EXIT_INTERRUPTED: i32 = 130;

/// Whether a signal asked this process to leave.
#[derive(Debug, Clone)]
pub struct Interrupt {
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Catches the signals from now on. A second SIGINT ends the process at once with code 130.
    pub fn install() -> Result<Self> {
        let failed = |e: std::io::Error| Error::Failed(format!("signals cannot be caught: {e}"));
        let signal = Arc::new(AtomicUsize::new(0));
        let interrupted = Arc::new(AtomicBool::new(false));
        // Handlers run in the order of their registration: the first SIGINT finds the flag unset and sets it.
        flag::register_conditional_shutdown(SIGINT, EXIT_INTERRUPTED, interrupted.clone()).map_err(failed)?;
        flag::register(SIGINT, interrupted).map_err(failed)?;
        for number in [SIGUSR1, SIGTERM, SIGINT] {
            flag::register_usize(number, signal.clone(), number as usize).map_err(failed)?;
        }
        Ok(Self { signal })
    }

    /// The signal that came last on this rank.
    pub fn requested(&self) -> Option<&'static str> {
        match self.signal.load(Ordering::SeqCst) as i32 {
            SIGUSR1 => Some("SIGUSR1"),
            SIGTERM => Some("SIGTERM"),
            SIGINT => Some("SIGINT"),
            _ => None,
        }
    }

    /// Whether a signal came on any rank: a collective, the same answer on all ranks, so that they leave at the same
    /// point of the run.
    pub fn agreed(&self, world: &World) -> Result<bool> {
        let mine = u32::from(self.requested().is_some());
        let any = world.host.all_reduce(&Tensor::new(&[mine], &Device::Cpu)?, ReduceOp::Max)?; // [1]
        Ok(any.to_vec1::<u32>()? == [1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::low_level::raise;

    #[test]
    fn signals_are_caught_and_named() {
        let interrupt = Interrupt::install().unwrap();
        let world = World::solo();
        assert_eq!(interrupt.requested(), None);
        assert!(!interrupt.agreed(&world).unwrap());
        for (signal, name) in [(SIGUSR1, "SIGUSR1"), (SIGTERM, "SIGTERM"), (SIGINT, "SIGINT")] {
            raise(signal).unwrap();
            assert_eq!(interrupt.requested(), Some(name));
            assert!(interrupt.agreed(&world).unwrap());
        }
    }
}
