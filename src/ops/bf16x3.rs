//! Factors of adapters in f32, for a GPU whose products are of bf16.
//!
//! A number of f32 is, but for its last 8 bits, the sum of two of bf16, a high half and a low one. So the product of two
//! factors is three products in bf16, that of the low halves left out (XLA's `BF16_BF16_F32_X3`):
//! `B A = Bh Ah + Bh Al + Bl Ah = [Bh Bh Bl] [Ah; Al; Ah]`, an adapter in bf16 of three times the rank. Its factors are off by
//! 2^-17 at most, those of bf16 by 2^-9, those of TF32 by 2^-12.

use super::float::Float;
use super::kernel::{Kernel, View};
use super::op::{Differentiable, apply1};
use candle_core::{Result, Tensor, bail};
use half::bf16;

/// One factor of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Factor {
    /// A `[rank, in]`, to become `[Ah; Al; Ah]` `[3 rank, in]`.
    A,
    /// B `[out, rank]`, to become `[Bh Bh Bl]` `[out, 3 rank]`.
    B,
}

impl Factor {
    /// Which of the three places has the low halves, 1 or 2.
    pub(super) fn low(self) -> usize {
        match self {
            Factor::A => 1,
            Factor::B => 2,
        }
    }

    /// How many numbers of a factor of `shape` stand side by side in each place.
    pub(super) fn width(self, shape: &[usize]) -> usize {
        match self {
            Factor::A => shape.iter().product(),
            Factor::B => shape.last().copied().unwrap_or(1),
        }
    }

    /// What the shape of a factor becomes.
    pub(super) fn tripled(self, shape: &[usize]) -> Result<Vec<usize>> {
        match (self, shape) {
            (Factor::A, &[rank, width]) => Ok(vec![3 * rank, width]),
            (Factor::B, &[width, rank]) => Ok(vec![width, 3 * rank]),
            _ => bail!("bf16x3: {shape:?} is no factor of an adapter"),
        }
    }
}

/// x as a product in bf16 takes it.
pub(super) fn bf16x3(x: &Tensor, factor: Factor) -> Result<Tensor> {
    apply1(factor, x)
}

impl Kernel<1> for Factor {
    const NAME: &'static str = "bf16x3";
    fn run<F: Float>(&self, [x]: [View<F>; 1]) -> Result<(Vec<F>, Vec<usize>)> {
        let (shape, width) = (self.tripled(x.shape)?, self.width(x.shape));
        let mut y = Vec::with_capacity(3 * x.data.len());
        for row in x.data.chunks(width.max(1)) {
            let halves = row.iter().map(|&x| {
                let high = F::of(bf16::from_f64(x.to_f64()).to_f64());
                (high, F::of(bf16::from_f64((x - high).to_f64()).to_f64()))
            });
            for place in 0..3 {
                y.extend(halves.clone().map(|(high, low)| if place == self.low() { low } else { high }));
            }
        }
        Ok((y, shape))
    }
}

impl Differentiable<1> for Factor {
    /// The sum of the gradients of the high halves, which between them meet both halves of the other factor.
    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let places = dy.reshape(((), 3, self.width(x.dims())))?;
        let dx = (places.narrow(1, 0, 1)? + places.narrow(1, 3 - self.low(), 1)?)?;
        Ok([Some(dx.reshape(x.shape())?)])
    }
}
