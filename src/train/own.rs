//! What a caller of the library brings to a run.

use crate::objective::Objective;
use crate::reward::Reward;
use std::sync::Arc;

/// What a caller brings to a run in the place of what its configuration says; by default nothing.
///
/// A checkpoint does not hold it: whoever resumes the run brings the same again.
#[derive(Default)]
pub struct Own {
    /// The rewards, in the place of `[[reward]]`; none: those of the configuration. Evaluations
    /// score them as well, and call the checkpoint the best one by the first of them.
    pub rewards: Vec<OwnReward>,
    /// What an update minimises, in the place of what `[method]` says; the advantages are those of
    /// `[advantage]`.
    pub objective: Option<Box<dyn Objective>>,
}

/// A reward of a caller.
#[derive(Clone)]
pub struct OwnReward {
    /// Training and evaluation share it.
    pub reward: Arc<dyn Reward>,
    /// What it counts in the sum; 0: it is scored and reported only.
    pub weight: f64,
}

impl OwnReward {
    /// A reward with its weight.
    pub fn new(reward: impl Reward + 'static, weight: f64) -> Self {
        Self { reward: Arc::new(reward), weight }
    }
}
