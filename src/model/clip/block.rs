//! A transformer block: attention and an MLP, each behind a norm, each added to its input.

use super::config::Activation;
use crate::error::Result;
use crate::model::Linear;
use crate::model::frozen::{LayerNorm, attention};
use crate::params::{SpecList, StageParams};
use candle_core::Tensor;

/// Sizes of a tower's blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub width: usize,
    pub hidden: usize,
    pub heads: usize,
    pub activation: Activation,
    pub eps: f64,
}

/// One block.
#[derive(Debug)]
pub(super) struct Block {
    sizes: Sizes,
    norm1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    norm2: LayerNorm,
    first: Linear,
    second: Linear,
}

impl Block {
    /// Declares the parameters of block `index` of the tower `tower`.
    pub fn new(specs: &mut SpecList, tower: &str, index: usize, sizes: Sizes) -> Self {
        let Sizes { width, hidden, eps, .. } = sizes;
        let name = |part: &str| format!("{tower}.encoder.layers.{index}.{part}");
        let mut linear = |part: &str, from, to| Linear::scaled(specs, &name(part), from, to);
        let [query, key, value, out] =
            ["q_proj", "k_proj", "v_proj", "out_proj"].map(|part| linear(&format!("self_attn.{part}"), width, width));
        let (first, second) = (linear("mlp.fc1", width, hidden), linear("mlp.fc2", hidden, width));
        let [norm1, norm2] = ["layer_norm1", "layer_norm2"].map(|part| LayerNorm::new(specs, &name(part), width, eps));
        Self { sizes, norm1, query, key, value, out, norm2, first, second }
    }

    /// x `[B, T, D]`; `mask` is added to the attention's scores.
    pub fn forward(&self, params: &StageParams, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let dim = width / self.sizes.heads;
        let h = self.norm1.forward(params, x)?;
        let heads = |linear: Linear| -> Result<Tensor> {
            Ok(linear.forward(params, &h)?.reshape((batch, tokens, self.sizes.heads, dim))?)
        };
        let (q, k, v) = (heads(self.query)?, heads(self.key)?, heads(self.value)?);
        let h = attention(&q, &k, &v, (dim as f64).powf(-0.5), mask)?; // [B, T, D]
        let x = (x + self.out.forward(params, &h)?)?;
        let h = self.first.forward(params, &self.norm2.forward(params, &x)?)?;
        Ok((&x + self.second.forward(params, &self.sizes.activation.forward(&h)?)?)?)
    }
}
