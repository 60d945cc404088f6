//! Names of collectives in messages, the same on every rank.

use super::Call;
use std::fmt::{self, Display, Formatter};
use std::sync::atomic::{AtomicU64, Ordering};

/// The plane of rewards, metrics and flags in messages.
pub(super) const HOST: &str = "host";
/// The plane of gradients and parameters in messages.
pub(super) const DEVICE: &str = "device";

/// Numbers the calls of one communicator. All ranks make the same calls on it in the same order, so a collective has one
/// number on all of them; over both planes it would not, as these run beside each other.
pub(super) struct Plane {
    name: &'static str,
    calls: AtomicU64,
}

/// One collective, in messages "all_reduce #17 of the device plane".
#[derive(Debug, Clone, Copy)]
pub(super) struct Collective {
    name: &'static str,
    /// The plane and the number there, from 1.
    place: Option<(&'static str, u64)>,
}

impl Plane {
    pub const fn new(name: &'static str) -> Self {
        Self { name, calls: AtomicU64::new(0) }
    }

    /// The next call.
    pub fn next(&self, call: Call) -> Collective {
        let number = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        Collective { name: call.name(), place: Some((self.name, number)) }
    }
}

impl Collective {
    /// What waits for peers as a collective does, once in a run: "init".
    pub const fn unnumbered(name: &'static str) -> Self {
        Self { name, place: None }
    }

    /// The number, 0 where there is none.
    pub fn number(self) -> u64 {
        self.place.map_or(0, |(_, number)| number)
    }
}

impl Display for Collective {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self.place {
            Some((plane, number)) => write!(f, "{} #{number} of the {plane} plane", self.name),
            None => f.write_str(self.name),
        }
    }
}
