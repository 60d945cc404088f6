//! The time's embedding.

use super::{Linear, ops};
use crate::error::Result;
use crate::params::{SpecList, StageParams};
use candle_core::{DType, Tensor};

/// Sinusoids of 1000 t, then two linear layers with SiLU between (diffusers `Timesteps` with `flip_sin_to_cos` and
/// `TimestepEmbedding`, embeddings.py of v0.33.1). The factor 1000 stands here and nowhere else.
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
        let half = self.frequencies / 2;
        let frequency = |i: usize| (-(10_000f64.ln()) * i as f64 / half as f64).exp();
        let mut features = Vec::new();
        for t in t.to_dtype(DType::F64)?.to_vec1::<f64>()? {
            features.extend((0..half).map(|i| libm::cos(1000.0 * t * frequency(i)) as f32));
            features.extend((0..half).map(|i| libm::sin(1000.0 * t * frequency(i)) as f32));
        }
        let features = Tensor::from_vec(features, (t.dim(0)?, 2 * half), t.device())?; // [B, frequencies]
        self.second.forward(params, &ops::silu(&self.first.forward(params, &features)?)?)
    }
}
