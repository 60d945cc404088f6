//! Matrix product with a weight: forms the weight's gradient only if the weight is trained.

use super::Wanted;
use super::float::{Float, matmul};
use super::kernel::{Kernel, View, run};
use super::op::{Differentiable, apply2, apply3};
use candle_core::{Result, Tensor, bail};

pub(super) fn threads() -> usize {
    candle_core::utils::get_num_threads()
}

/// `shape` with another last dimension.
pub(super) fn with_last(shape: &[usize], last: usize) -> Vec<usize> {
    let mut shape = shape.to_vec();
    if let Some(old) = shape.last_mut() {
        *old = last;
    }
    shape
}

/// Rows and width of `x` `[.., in]`, checked against `w` `[out, in]`.
fn sizes<F>(x: View<F>, w: View<F>) -> Result<(usize, usize, usize)> {
    let &[out_dim, in_dim] = w.shape else { bail!("linear: the weight has shape {:?}, not [out, in]", w.shape) };
    if x.last() != in_dim {
        bail!("linear: input {:?} does not fit weight {:?}", x.shape, w.shape);
    }
    Ok((x.data.len() / in_dim.max(1), in_dim, out_dim))
}

/// x W^T, plus the bias.
pub(super) fn product<F: Float>(x: View<F>, w: View<F>, bias: Option<View<F>>) -> Result<(Vec<F>, Vec<usize>)> {
    let (rows, in_dim, out_dim) = sizes(x, w)?;
    let mut out = match bias {
        Some(b) if b.data.len() != out_dim => bail!("linear: bias {:?} does not fit weight {:?}", b.shape, w.shape),
        Some(b) => b.data.repeat(rows),
        None => vec![F::ZERO; rows * out_dim],
    };
    let (a, b) = ((x.data, in_dim, 1), (w.data, 1, in_dim));
    matmul((rows, in_dim, out_dim), a, b, &mut out, out_dim, F::ONE, bias.is_some(), threads());
    Ok((out, with_last(x.shape, out_dim)))
}

/// dx becomes dy W, or has it added.
pub(super) fn product_back<F: Float>(dy: View<F>, w: View<F>, dx: &mut [F], accumulate: bool) {
    let (out_dim, in_dim) = (dy.last(), w.last());
    let (a, b) = ((dy.data, out_dim, 1), (w.data, in_dim, 1));
    matmul((dy.data.len() / out_dim.max(1), out_dim, in_dim), a, b, dx, in_dim, F::ONE, accumulate, threads());
}

/// x W^T + b.
pub(super) struct Linear(pub(super) Wanted);

impl Linear {
    fn value<F: Float>(&self, x: View<F>, w: View<F>, bias: Option<View<F>>) -> Result<(Vec<F>, Vec<usize>)> {
        match self.0 {
            Wanted::Value => product(x, w, bias),
            Wanted::Gradient => {
                let (rows, _, out_dim) = sizes(x, w)?;
                Ok((vec![F::ZERO; rows * out_dim], with_last(x.shape, out_dim)))
            }
        }
    }
}

impl Kernel<2> for Linear {
    const NAME: &'static str = "linear";
    fn run<F: Float>(&self, [x, w]: [View<F>; 2]) -> Result<(Vec<F>, Vec<usize>)> {
        self.value(x, w, None)
    }
}

impl Kernel<3> for Linear {
    const NAME: &'static str = "linear";
    fn run<F: Float>(&self, [x, w, b]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        self.value(x, w, Some(b))
    }
}

impl Differentiable<2> for Linear {
    fn backward(&self, [x, w]: [&Tensor; 2], _: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 2]> {
        Ok([
            x.track_op().then(|| run(&InputGradient, [dy, w])).transpose()?,
            w.track_op().then(|| run(&WeightGradient, [dy, x])).transpose()?,
        ])
    }
}

impl Differentiable<3> for Linear {
    fn backward(&self, [x, w, b]: [&Tensor; 3], y: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let [dx, dw] = Differentiable::<2>::backward(self, [x, w], y, dy)?;
        Ok([dx, dw, b.track_op().then(|| run(&BiasGradient, [dy])).transpose()?])
    }
}

/// dy W, `[.., out] [out, in] -> [.., in]`.
pub(super) struct InputGradient;

impl Kernel<2> for InputGradient {
    const NAME: &'static str = "linear";
    fn run<F: Float>(&self, [dy, w]: [View<F>; 2]) -> Result<(Vec<F>, Vec<usize>)> {
        let mut dx = vec![F::ZERO; dy.data.len() / dy.last().max(1) * w.last()];
        product_back(dy, w, &mut dx, false);
        Ok((dx, with_last(dy.shape, w.last())))
    }
}

/// dy^T x, `[.., out] [.., in] -> [out, in]`.
pub(super) struct WeightGradient;

impl Kernel<2> for WeightGradient {
    const NAME: &'static str = "linear";
    fn run<F: Float>(&self, [dy, x]: [View<F>; 2]) -> Result<(Vec<F>, Vec<usize>)> {
        let (out_dim, in_dim) = (dy.last(), x.last());
        let rows = x.data.len() / in_dim;
        let mut dw = vec![F::ZERO; out_dim * in_dim];
        let (a, b) = ((dy.data, 1, out_dim), (x.data, in_dim, 1));
        matmul((out_dim, rows, in_dim), a, b, &mut dw, in_dim, F::ONE, false, threads());
        Ok((dw, vec![out_dim, in_dim]))
    }
}

/// Sum of dy over all but the last dimension.
struct BiasGradient;

impl Kernel<1> for BiasGradient {
    const NAME: &'static str = "linear";
    fn run<F: Float>(&self, [dy]: [View<F>; 1]) -> Result<(Vec<F>, Vec<usize>)> {
        let mut db = vec![F::ZERO; dy.last()];
        for row in dy.data.chunks_exact(dy.last()) {
            for (db, &dy) in db.iter_mut().zip(row) {
                *db += dy;
            }
        }
        Ok((db, vec![dy.last()]))
    }
}

/// `x W^T + b`: x `[.., in]`, weight `[out, in]`, bias `[out]`, result `[.., out]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    linear_for(Wanted::Value, x, weight, bias)
}

/// [`linear`], or a result that has its gradients alone.
pub fn linear_for(wanted: Wanted, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => apply3(Linear(wanted), x, weight, bias),
        None => apply2(Linear(wanted), x, weight),
    }
}
