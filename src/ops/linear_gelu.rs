//! A linear layer and GELU as one operation: a GPU takes both, and what is kept between them, in one pass.

use super::activation::{self, Backward, Gelu};
use super::float::Float;
use super::kernel::{Kernel, View, run};
use super::linear::{Linear, product};
use super::op::{Differentiable, apply3};
use super::{Wanted, linear};
use candle_core::{Device, Result, Tensor, bail};
use std::sync::OnceLock;

/// gelu(x W^T + b), of (x, W, b).
pub(super) struct LinearGelu {
    /// Whether there will be a backward pass.
    pub(super) is_tracked: bool,
    /// x W^T + b: what the forward pass keeps for the backward pass.
    pub(super) before: OnceLock<Tensor>,
}

impl LinearGelu {
    /// What the forward pass has kept.
    pub(super) fn before(&self) -> Result<&Tensor> {
        match self.before.get() {
            Some(before) => Ok(before),
            None => bail!("linear_gelu: the backward pass comes before the forward pass"),
        }
    }
}

impl Kernel<3> for LinearGelu {
    const NAME: &'static str = "linear_gelu";
    fn run<F: Float>(&self, [x, w, b]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        let (before, shape) = product(x, w, Some(b))?;
        let (y, _) = activation::Forward(Gelu).run([View { data: &before, shape: &shape }])?;
        if self.is_tracked {
            // An operation is applied once.
            let _ = self.before.set(Tensor::from_vec(before, &shape[..], &Device::Cpu)?);
        }
        Ok((y, shape))
    }
}

impl Differentiable<3> for LinearGelu {
    fn backward(&self, inputs: [&Tensor; 3], _: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let before = self.before()?;
        let d = run(&Backward(Gelu), [before, dy])?;
        Differentiable::<3>::backward(&Linear(Wanted::Value), inputs, before, &d)
    }
}

/// `gelu(x W^T + b)`, tanh approximation: x `[.., in]`, weight `[out, in]`, bias `[out]`, result `[.., out]`.
pub fn linear_gelu(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let Some(bias) = bias else { return activation::gelu(&linear(x, weight, None)?) };
    let is_tracked = [x, weight, bias].iter().any(|t| t.track_op());
    apply3(LinearGelu { is_tracked, before: OnceLock::new() }, x, weight, bias)
}
