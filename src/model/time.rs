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
        // In f32 as there: 1000 t times the rounding of a frequency is 1e-5 of an angle, and the weights know these angles.
        let frequency = |i: usize| f64::from(-(10_000f64.ln()) as f32 * i as f32 / half as f32).exp() as f32;
        let mut features = Vec::new();
        for t in t.to_dtype(DType::F64)?.to_vec1::<f64>()? {
            let angle = |i: usize| f64::from((1000.0 * t) as f32 * frequency(i));
            features.extend((0..half).map(|i| libm::cos(angle(i)) as f32));
            features.extend((0..half).map(|i| libm::sin(angle(i)) as f32));
        }
        let features = Tensor::from_vec(features, (t.dim(0)?, 2 * half), t.device())?; // [B, frequencies]
        let features = features.to_dtype(self.first.dtype(params)?)?;
        self.second.forward(params, &ops::silu(&self.first.forward(params, &features)?)?)
    }
}
