//! Matrix product with a weight: forms the weight's gradient only if the weight is trained.

use super::float::{Float, matmul};
use super::op::{Differentiable, Kernel, View, apply2, apply3, run};
use candle_core::{Result, Tensor, bail};

fn threads() -> usize {
    candle_core::utils::get_num_threads()
}

/// Rows and width of `x` `[.., in]`, checked against `w` `[out, in]`.
fn sizes<F>(x: View<F>, w: View<F>) -> Result<(usize, usize, usize)> {
    let &[out_dim, in_dim] = w.shape else { bail!("linear: the weight has shape {:?}, not [out, in]", w.shape) };
    if x.last() != in_dim {
        bail!("linear: input {:?} does not fit weight {:?}", x.shape, w.shape);
    }
    Ok((x.data.len() / in_dim.max(1), in_dim, out_dim))
}

fn product<F: Float>(x: View<F>, w: View<F>, bias: Option<View<F>>) -> Result<(Vec<F>, Vec<usize>)> {
    let (rows, in_dim, out_dim) = sizes(x, w)?;
    let mut out = match bias {
        Some(b) if b.data.len() != out_dim => bail!("linear: bias {:?} does not fit weight {:?}", b.shape, w.shape),
        Some(b) => b.data.repeat(rows),
        None => vec![F::ZERO; rows * out_dim],
    };
    let (a, b) = ((x.data, in_dim, 1), (w.data, 1, in_dim));
    matmul((rows, in_dim, out_dim), a, b, &mut out, out_dim, F::ONE, bias.is_some(), threads());
    let mut shape = x.shape.to_vec();
    if let Some(last) = shape.last_mut() {
        *last = out_dim;
    }
    Ok((out, shape))
}

/// x W^T + b.
pub(super) struct Linear;

impl Kernel<2> for Linear {
    const NAME: &'static str = "linear";
    fn run<F: Float>(&self, [x, w]: [View<F>; 2]) -> Result<(Vec<F>, Vec<usize>)> {
        product(x, w, None)
    }
}

impl Kernel<3> for Linear {
    const NAME: &'static str = "linear";
    fn run<F: Float>(&self, [x, w, b]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        product(x, w, Some(b))
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
struct InputGradient;

impl Kernel<2> for InputGradient {
    const NAME: &'static str = "linear";
    fn run<F: Float>(&self, [dy, w]: [View<F>; 2]) -> Result<(Vec<F>, Vec<usize>)> {
        let (out_dim, in_dim) = (w.shape[0], w.shape[1]);
        let rows = dy.data.len() / out_dim;
        let mut dx = vec![F::ZERO; rows * in_dim];
        let (a, b) = ((dy.data, out_dim, 1), (w.data, in_dim, 1));
        matmul((rows, out_dim, in_dim), a, b, &mut dx, in_dim, F::ONE, false, threads());
        let mut shape = dy.shape.to_vec();
        if let Some(last) = shape.last_mut() {
            *last = in_dim;
        }
        Ok((dx, shape))
    }
}

/// dy^T x, `[.., out] [.., in] -> [out, in]`.
struct WeightGradient;

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
    match bias {
        Some(bias) => apply3(Linear, x, weight, bias),
        None => apply2(Linear, x, weight),
    }
}
