//! The time's embedding.

use super::Linear;
use crate::error::Result;
use crate::ops;
use crate::params::{SpecList, StageParams};
use candle_core::Tensor;

/// Sinusoids of 1000 t, then two linear layers with SiLU between (diffusers `Timesteps` with `flip_sin_to_cos` and
/// `TimestepEmbedding`, embeddings.py of v0.33.1).
#[derive(Debug, Clone, Copy)]
pub struct TimeEmbedding {
    frequencies: usize,
    first: Linear,
    second: Linear,
}

impl TimeEmbedding {
    /// Declares `name.linear_1` and `name.linear_2`; `frequencies` is the number of sines and cosines together.
    pub fn new(specs: &mut SpecList, name: &str, frequencies: usize, width: usize) -> Self {
        Self {
            frequencies,
            first: Linear::scaled(specs, &format!("{name}.linear_1"), frequencies, width),
            second: Linear::scaled(specs, &format!("{name}.linear_2"), width, width),
        }
    }

    /// t `[B]` in [0, 1] to `[B, width]`.
    pub fn forward(&self, params: &StageParams, t: &Tensor) -> Result<Tensor> {
        let features = ops::time_features(t, self.frequencies / 2)?; // [B, frequencies]
        let features = features.to_dtype(self.first.dtype(params)?)?;
        self.second.forward(params, &ops::silu(&self.first.forward(params, &features)?)?)
    }
}
