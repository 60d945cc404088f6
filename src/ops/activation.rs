//! Elementwise activations, one pass each way.

use super::float::Float;
use super::kernel::{Kernel, View, fill, run};
use super::op::{Differentiable, apply1};
use candle_core::{Result, Tensor};

/// Elements handled at once by one thread.
const PIECE: usize = 1 << 14;

/// `x * sigmoid(s(x))`: both activations are of this form.
pub(super) trait Gated: Send + Sync + Copy + 'static {
    const NAME: &'static str;
    /// s(x) and its derivative.
    fn gate<F: Float>(x: F) -> (F, F);
}

/// x sigmoid(x).
#[derive(Clone, Copy)]
struct Silu;

impl Gated for Silu {
    const NAME: &'static str = "silu";
    #[inline(always)]
    fn gate<F: Float>(x: F) -> (F, F) {
        (x, F::ONE)
    }
}

/// The tanh approximation: 0.5 x (1 + tanh(u)) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3).
#[derive(Clone, Copy)]
pub(super) struct Gelu;

impl Gated for Gelu {
    const NAME: &'static str = "gelu";
    #[inline(always)]
    fn gate<F: Float>(x: F) -> (F, F) {
        let (k, c) = (F::of(2.0 * 0.797_884_560_802_865_4), F::of(0.044715));
        let square = x * x;
        (k * x * (F::ONE + c * square), k * (F::ONE + F::of(3.0) * c * square))
    }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(super) fn sigmoid<F: Float>(x: F) -> F {
    F::ONE / (F::ONE + Float::exp(-x))
}

pub(super) struct Forward<G>(pub(super) G);
pub(super) struct Backward<G>(pub(super) G);

impl<G: Gated> Kernel<1> for Forward<G> {
    const NAME: &'static str = G::NAME;
    fn run<F: Float>(&self, [x]: [View<F>; 1]) -> Result<(Vec<F>, Vec<usize>)> {
        let mut out = vec![F::ZERO; x.data.len()];
        fill(&mut out, PIECE, |i, out| {
            for (out, &x) in out.iter_mut().zip(&x.data[i * PIECE..]) {
                *out = x * sigmoid(G::gate(x).0);
            }
        });
        Ok((out, x.shape.to_vec()))
    }
}

impl<G: Gated> Kernel<2> for Backward<G> {
    const NAME: &'static str = G::NAME;
    fn run<F: Float>(&self, [x, dy]: [View<F>; 2]) -> Result<(Vec<F>, Vec<usize>)> {
        let mut out = vec![F::ZERO; x.data.len()];
        fill(&mut out, PIECE, |i, out| {
            let pairs = x.data[i * PIECE..].iter().zip(&dy.data[i * PIECE..]);
            for (out, (&x, &dy)) in out.iter_mut().zip(pairs) {
                let (gate, slope) = G::gate(x);
                let s = sigmoid(gate);
                *out = dy * (s + x * s * (F::ONE - s) * slope);
            }
        });
        Ok((out, x.shape.to_vec()))
    }
}

impl<G: Gated> Differentiable<1> for Forward<G> {
    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 1]> {
        Ok([Some(run(&Backward(self.0), [x, dy])?)])
    }
}

/// GELU, tanh approximation, of any shape.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    apply1(Forward(Gelu), x)
}

/// SiLU of any shape.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    apply1(Forward(Silu), x)
}
