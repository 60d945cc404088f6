//! Whether what a rank holds fits into its device.

use super::Machine;
use crate::error::{Error, Result};
use crate::plan::Plan;
use serde::Serialize;
use std::fmt;

/// Above this share of a device little is left for activations.
const NEARLY_FULL: f64 = 0.9;

/// Memory of a rank in GiB.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memory {
    /// Weights, optimizer state and gradients; activations come on top.
    pub held_gib: f64,
    /// The rank's device, or its share of one.
    pub device_gib: f64,
}

impl Memory {
    /// Of the plan's ranks, each of which has `share` of a device.
    ///
    /// # Errors
    /// [`Error::Usage`] where the held state alone is more than that.
    pub fn new(plan: &Plan, machine: &Machine, share: f64) -> Result<Self> {
        let memory = Self { held_gib: plan.held() as f64 / (1 << 30) as f64, device_gib: share * machine.memory_gib };
        match memory.held_gib > memory.device_gib {
            false => Ok(memory),
            true => Err(Error::Usage(format!(
                "{}: {memory}: does not fit; use more ranks, parallel.shard = \"full\", or model.trainable = \"lora\"",
                machine.name
            ))),
        }
    }
}

/// `a rank holds 31.2 of 79.6 GiB (39 %), and activations`
impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { held_gib, device_gib } = self;
        let share = held_gib / device_gib;
        write!(f, "a rank holds {held_gib:.1} of {device_gib:.1} GiB ({:.0} %), and activations", 100.0 * share)?;
        if share > NEARLY_FULL && share <= 1.0 {
            write!(f, ": warning: little is left for them")?;
        }
        Ok(())
    }
}
