//! How fast the slow copies follow the policy.

use serde::{Deserialize, Serialize};

/// Which published schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum OldPolicySchedule {
    /// Type 0: the old policy is the policy.
    OnPolicy,
    /// Type 1: min(0.001 n, 0.5).
    Linear,
    /// Type 2: 0 before update 75, then min(0.0075 (n - 75), 0.999).
    Delayed,
}

/// The share `eta(n) = min(rate (n - delay), max)` of itself that the old policy keeps when it is moved towards the policy
/// after an iteration, `old = eta old + (1 - eta) policy`, n = updates so far (DiffusionNFT, scripts/train_nft_sd3.py
/// `return_decay`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OldPolicyDecay {
    /// Updates before it rises from 0.
    pub delay: u64,
    /// What it rises by with an update.
    pub rate: f64,
    /// What it rises to.
    pub max: f64,
}

impl OldPolicySchedule {
    /// Its published numbers.
    pub fn decay(self) -> OldPolicyDecay {
        match self {
            Self::OnPolicy => OldPolicyDecay { delay: 0, rate: 0.0, max: 0.0 },
            Self::Linear => OldPolicyDecay { delay: 0, rate: 0.001, max: 0.5 },
            Self::Delayed => OldPolicyDecay { delay: 75, rate: 0.0075, max: 0.999 },
        }
    }
}

impl OldPolicyDecay {
    /// eta at update n.
    pub fn eta(self, update: u64) -> f64 {
        (self.rate * update.saturating_sub(self.delay) as f64).min(self.max)
    }

    /// Whether eta is 0 at every update.
    pub fn is_zero(&self) -> bool {
        self.rate == 0.0 || self.max == 0.0
    }
}

impl TryFrom<u8> for OldPolicySchedule {
    type Error = String;
    fn try_from(kind: u8) -> Result<Self, String> {
        match kind {
            0 => Ok(Self::OnPolicy),
            1 => Ok(Self::Linear),
            2 => Ok(Self::Delayed),
            other => Err(format!("{other} is no old-policy schedule; use 0 (on policy), 1 (linear) or 2 (delayed)")),
        }
    }
}

impl From<OldPolicySchedule> for u8 {
    fn from(schedule: OldPolicySchedule) -> u8 {
        schedule as u8
    }
}

/// Decay of the evaluation EMA at update n, `min((1 + n) / (10 + n), largest)` (DiffusionNFT, flow_grpo/ema.py).
pub fn ema_decay(update: u64, largest: f64) -> f64 {
    let n = update as f64;
    ((1.0 + n) / (10.0 + n)).min(largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_have_the_published_values() {
        for (kind, values) in [(0, [0.0, 0.0, 0.0, 0.0]), (1, [0.0, 0.074, 0.5, 0.5]), (2, [0.0, 0.0, 0.999, 0.999])] {
            let schedule = OldPolicySchedule::try_from(kind).expect("a schedule");
            assert_eq!([0, 74, 500, 10_000].map(|n| schedule.decay().eta(n)), values, "type {kind}");
        }
        assert_eq!(OldPolicySchedule::Delayed.decay().eta(175), 0.75);
        assert!(OldPolicySchedule::try_from(3).is_err());
        assert_eq!(ema_decay(0, 0.9), 0.1);
        assert_eq!(ema_decay(1000, 0.9), 0.9);
    }
}
