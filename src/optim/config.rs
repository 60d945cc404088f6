//! `[optim]`.

use serde::{Deserialize, Serialize};

/// `[optim]`: AdamW, in f32 (defaults of DiffusionNFT and FlowAWR).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and second moment, each in [0, 1).
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; it is scaled down to this.
    pub clip: f64,
    /// A reward, sample, advantage or gradient that is not finite ends the run ("stop"), or is left
    /// out and counted ("skip"); the weights are left alone either way.
    pub not_finite: NotFinite,
}

/// What happens when a number that must be finite is not. The weights are left alone either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NotFinite {
    /// The run ends.
    Stop,
    /// The update, or the iteration if it happens before its updates, is left out and counted.
    Skip,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self { lr: 3e-4, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 1e-4, clip: 1.0, not_finite: NotFinite::Stop }
    }
}
