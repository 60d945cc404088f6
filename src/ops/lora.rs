//! A frozen linear layer and the adapter beside it, as one operation: five composed ones keep four results of the layer's
//! size for the backward pass, this one its input and x A^T, and go over such results three times more.

use super::Wanted;
use super::bf16x3::{Factor, bf16x3};
use super::float::{Float, matmul};
use super::kernel::{Kernel, View, refuse_tracked, run, with_view};
use super::linear::{self, WeightGradient, product, product_back, threads, with_last};
use super::op::{Differentiable, apply3, operand};
use candle_core::{DType, Device, Result, Tensor, bail};
use std::sync::OnceLock;

/// x W^T + b + scale x A^T B^T, of (x, A, B).
pub(super) struct Lora {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
    pub(super) scale: f64,
    pub(super) wanted: Wanted,
    /// x A^T `[.., rank]`: what the forward pass keeps for the backward pass.
    pub(super) projected: OnceLock<Tensor>,
}

impl Lora {
    /// What the forward pass has kept.
    pub(super) fn projected(&self) -> Result<&Tensor> {
        match self.projected.get() {
            Some(projected) => Ok(projected),
            None => bail!("lora: the backward pass comes before the forward pass"),
        }
    }

    /// The frozen layer of x.
    fn frozen<F: Float>(&self, x: View<F>) -> Result<Vec<F>> {
        with_view(&self.weight, |w| match &self.bias {
            Some(bias) => with_view(bias, |bias| Ok(product(x, w, Some(bias))?.0)),
            None => Ok(product(x, w, None)?.0),
        })
    }
}

impl Kernel<3> for Lora {
    const NAME: &'static str = "lora";
    fn run<F: Float>(&self, [x, a, b]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        let (out_dim, rank) = (self.weight.dim(0)?, a.shape[0]);
        if b.shape != [out_dim, rank] {
            bail!("lora: factors {:?}, {:?} do not fit weight {:?}", a.shape, b.shape, self.weight.dims());
        }
        let (projected, shape) = product(x, a, None)?;
        let rows = projected.len() / rank.max(1);
        let y = match self.wanted {
            Wanted::Gradient => vec![F::ZERO; rows * out_dim],
            Wanted::Value => {
                let mut y = self.frozen(x)?;
                let (left, right) = ((&projected[..], rank, 1), (b.data, 1, rank));
                matmul((rows, rank, out_dim), left, right, &mut y, out_dim, F::of(self.scale), true, threads());
                y
            }
        };
        // An operation is applied once.
        let _ = self.projected.set(Tensor::from_vec(projected, shape, &Device::Cpu)?);
        Ok((y, with_last(x.shape, out_dim)))
    }
}

/// (dy, W, d, A) -> dy W + d A, the gradient of x, given that of x A^T.
struct InputGradient;

impl Kernel<4> for InputGradient {
    const NAME: &'static str = "lora";
    fn run<F: Float>(&self, [dy, w, d, a]: [View<F>; 4]) -> Result<(Vec<F>, Vec<usize>)> {
        let mut dx = vec![F::ZERO; dy.data.len() / dy.last().max(1) * w.last()];
        product_back(dy, w, &mut dx, false);
        product_back(d, a, &mut dx, true);
        Ok((dx, with_last(dy.shape, w.last())))
    }
}

impl Differentiable<3> for Lora {
    fn backward(&self, [x, a, b]: [&Tensor; 3], _: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let d = (run(&linear::InputGradient, [dy, b])? * self.scale)?; // of x A^T
        let db = || run(&WeightGradient, [dy, self.projected()?])? * self.scale;
        Ok([
            x.track_op().then(|| run(&InputGradient, [dy, &self.weight, &d, a])).transpose()?,
            a.track_op().then(|| run(&WeightGradient, [&d, x])).transpose()?,
            b.track_op().then(db).transpose()?,
        ])
    }
}

/// `x W^T + b + scale x A^T B^T` with x `[.., in]`, the frozen W `[out, in]` and b `[out]`, the factors A `[rank, in]` and B
/// `[out, rank]`; result `[.., out]`, of the type of x (Hu et al., arXiv 2106.09685). Factors in f32 beside x in bf16 are not
/// rounded to bf16: a CPU multiplies in f32, a GPU their high and low halves (`bf16x3`).
///
/// # Errors
/// W or b wants a gradient.
pub fn lora(
    x: &Tensor,
    (weight, bias): (&Tensor, Option<&Tensor>),
    (a, b, scale): (&Tensor, &Tensor, f64),
    wanted: Wanted,
) -> Result<Tensor> {
    refuse_tracked("lora", &[weight, bias.unwrap_or(weight)])?;
    let frozen = |t: &Tensor| operand(t, x.dtype());
    let (weight, bias) = (frozen(weight)?, bias.map(frozen).transpose()?);
    let is_split = |factor: &Tensor| x.device().is_cuda() && x.dtype() == DType::BF16 && factor.dtype() == DType::F32;
    let split = |factor: &Tensor, which| if is_split(factor) { bf16x3(factor, which) } else { Ok(factor.clone()) };
    let (a, b) = (&split(a, Factor::A)?, &split(b, Factor::B)?);
    apply3(Lora { weight, bias, scale, wanted, projected: OnceLock::new() }, x, a, b)
}
