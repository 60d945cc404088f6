//! A linear layer with, where the configuration wants one, a low-rank adapter beside it.

use crate::error::Result;
use crate::ops::{self, Wanted};
use crate::params::{Init, Slot, SpecList, StageParams};
use candle_core::{DType, Tensor};

/// `W x + b`, and `+ alpha/rank * B A x` while the adapter is on.
#[derive(Debug, Clone, Copy)]
pub struct Linear {
    weight: Slot,
    bias: Option<Slot>,
    adapter: Option<(Slot, Slot, f64)>,
}

impl Linear {
    /// Declares `name.weight` `[out, in]`, `name.bias` `[out]` (zero) and the adapter's factors.
    pub fn new(specs: &mut SpecList, name: &str, in_dim: usize, out_dim: usize, init: Init) -> Self {
        Self {
            weight: specs.base(&format!("{name}.weight"), &[out_dim, in_dim], init),
            bias: Some(specs.base(&format!("{name}.bias"), &[out_dim], Init::Zeros)),
            adapter: specs.adapter(name, in_dim, out_dim),
        }
    }

    /// With weights of variance 1 / in.
    pub fn scaled(specs: &mut SpecList, name: &str, in_dim: usize, out_dim: usize) -> Self {
        Self::new(specs, name, in_dim, out_dim, Init::Normal((in_dim as f64).powf(-0.5)))
    }

    /// The weight's type, which x has to have.
    pub fn dtype(&self, params: &StageParams) -> Result<DType> {
        Ok(params.get(self.weight)?.dtype())
    }

    /// x `[.., in]` to `[.., out]`.
    pub fn forward(&self, params: &StageParams, x: &Tensor) -> Result<Tensor> {
        self.run(params, x, Wanted::Value)
    }

    /// `x + gate * y` with x `[B, .., out]`, gate `[B, out]` and y the layer `second` of GELU of this layer of h `[B, .., in]`:
    /// the feed-forward end of a block. Where only gradients are wanted y is not formed, unless the gate's gradient needs it.
    pub fn feed_forward_onto(
        &self,
        second: &Linear,
        params: &StageParams,
        (x, gate): (&Tensor, &Tensor),
        h: &Tensor,
        wanted: Wanted,
    ) -> Result<Tensor> {
        let wanted = if gate.track_op() { Wanted::Value } else { wanted };
        let y = match (self.factors(params), second.factors(params)) {
            (None, None) => ops::feed_forward(h, self.layer(params)?, second.layer(params)?, wanted)?,
            _ => second.run(params, &ops::gelu(&self.forward(params, h)?)?, wanted)?,
        };
        Ok(ops::gated_residual(x, gate, &y)?)
    }

    fn run(&self, params: &StageParams, x: &Tensor, wanted: Wanted) -> Result<Tensor> {
        let (weight, bias) = self.layer(params)?;
        Ok(match self.factors(params) {
            Some(factors) => ops::lora(x, (weight, bias), factors, wanted)?,
            None => ops::linear_for(wanted, x, weight, bias)?,
        })
    }

    /// Weight and bias, which are frozen beside an adapter.
    fn layer<'a>(&self, params: &'a StageParams) -> Result<(&'a Tensor, Option<&'a Tensor>)> {
        Ok((params.get(self.weight)?, self.bias.map(|b| params.get(b)).transpose()?))
    }

    /// A, B and the scale of the adapter, where one is on.
    fn factors<'a>(&self, params: &'a StageParams) -> Option<(&'a Tensor, &'a Tensor, f64)> {
        let (a, b, scale) = self.adapter?;
        Some((params.adapter(a)?, params.adapter(b)?, scale))
    }
}
