//! `[optim]`.

use serde::{Deserialize, Serialize};

/// AdamW and clipping (the defaults are DiffusionNFT's and FlowAWR's).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global norm of the gradient.
    pub clip: f64,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self { lr: 3e-4, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 1e-4, clip: 1.0 }
    }
}
