//! The optimizer: AdamW on this rank's shard of the flat parameters, clipping, and the slow copies beside them.

mod adamw;
mod config;
mod schedule;
mod sharded;

pub use config::{NotFinite, OptimConfig};
pub use schedule::{OldPolicyDecay, OldPolicySchedule};
pub(crate) use sharded::VECTORS;
pub use sharded::{Sharded, StepReport};
