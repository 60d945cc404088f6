//! What a cluster's nodes can do: `configs/machines/*.toml`.

use crate::error::Error;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One kind of node and what connects the nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// What it is called.
    pub name: String,
    /// What a rank computes on: GPUs of a node, or cores where there are none.
    pub devices: usize,
    /// Memory of one device, GiB.
    pub memory_gib: f64,
    /// What one device computes.
    pub compute: Compute,
    /// What a rank sends.
    pub network: Network,
}

/// Speeds of one device, as reached, not as printed on its box.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compute {
    /// Of the velocity model in a rollout, 1e12 floating-point operations a second.
    pub sample_tflops: f64,
    /// Of the training passes, 1e12 floating-point operations a second.
    pub train_tflops: f64,
    /// Decoding a picture, seconds.
    pub decode_s: f64,
    /// Scoring a picture, seconds; what scoring beside sampling hides is not in it.
    pub reward_s: f64,
    /// Optimizer state that AdamW reads and writes, GB a second.
    pub optimizer_gb_s: f64,
}

/// What a rank sends in a ring, every rank at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// To a rank of its own node, GB a second.
    pub intra_gb_s: f64,
    /// To a rank of another node, GB a second.
    pub inter_gb_s: f64,
    /// Of a collective's one step, microseconds.
    pub latency_us: f64,
}

impl Machine {
    /// Reads a machine file.
    ///
    /// # Errors
    /// [`Error::Usage`]: file, key, value and remedy.
    pub fn read(path: &Path) -> Result<Self, Error> {
        crate::config::read(path, &[], Self::check)
    }

    fn check(&self) -> Result<(), String> {
        let (compute, network) = (&self.compute, &self.network);
        let above_zero = [
            ("memory_gib", self.memory_gib),
            ("devices", self.devices as f64),
            ("compute.sample_tflops", compute.sample_tflops),
            ("compute.train_tflops", compute.train_tflops),
            ("compute.optimizer_gb_s", compute.optimizer_gb_s),
            ("network.intra_gb_s", network.intra_gb_s),
            ("network.inter_gb_s", network.inter_gb_s),
        ];
        let not_below = [
            ("compute.decode_s", compute.decode_s),
            ("compute.reward_s", compute.reward_s),
            ("network.latency_us", network.latency_us),
        ];
        let bad = |&&(_, value): &&(&str, f64), least: bool| !value.is_finite() || value < 0.0 || least && value == 0.0;
        if let Some((key, value)) = above_zero.iter().find(|entry| bad(entry, true)) {
            return Err(format!("{key} = {value}: must be a finite number above 0"));
        }
        match not_below.iter().find(|entry| bad(entry, false)) {
            Some((key, value)) => Err(format!("{key} = {value}: must be a finite number, 0 or above")),
            None => Ok(()),
        }
    }
}
