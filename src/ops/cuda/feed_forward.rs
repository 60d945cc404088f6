//! [`crate::ops::feed_forward`] on a GPU.

use super::linear::product;
use super::{Input, made, on_storage};
use crate::cuda::product::{Matrix, Then, multiply};
use crate::cuda::reduce::{Summand, sum_rows};
use crate::cuda::{self, Array};
use crate::ops::linear::with_last;
use crate::ops::{Wanted, tape};
use candle_core::backend::BackendDevice;
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Layout, Result, Storage, Tensor, bail};

/// Of x, W1, b1, W2, b2, where one of them wants a gradient and a tape runs; else nothing.
pub(in crate::ops) fn feed_forward(all: [&Tensor; 5], wanted: Wanted) -> Result<Option<Tensor>> {
    let [x, w1, _, w2, _] = all;
    let tracked = all.map(Tensor::track_op);
    let fits = |t: &&Tensor| t.is_contiguous() && t.dtype() == x.dtype() && t.device().is_cuda();
    if !all.iter().all(fits) || !tracked.contains(&true) || !tape::is_running() {
        return Ok(None);
    }
    let ((hidden, width), (out, second_width)) = (w1.dims2()?, w2.dims2()?);
    if second_width != hidden || x.dims().last() != Some(&width) {
        bail!("feed_forward: {w1:?} and {w2:?} do not fit {x:?}");
    }
    let (gpu, dtype) = (x.device().as_cuda_device()?, x.dtype());
    let (shape, inner) = (with_last(x.dims(), out), with_last(x.dims(), hidden));
    let (before_memory, before) = made(gpu, dtype, &inner)?;
    // What GELU makes of it: for the value, and for the gradient of W2.
    let is_formed = wanted == Wanted::Value || tracked[3];
    let (memory, activated) = on_storage(&all, |parts| {
        let [x, w1, b1, w2, b2] = &arrays::<5>(parts)?;
        let (a, b) = (Matrix::new(x, width), Matrix::new(w1, width).transposed());
        if !is_formed {
            multiply(gpu, 1.0, a, b, &before, Then::Bias(b1))?;
            return Ok((gpu.zeros_impl(&shape.as_slice().into(), dtype)?, None));
        }
        let (activated, h) = made(gpu, dtype, &inner)?;
        multiply(gpu, 1.0, a, b, &h, Then::BiasGelu(b1, Some(&before)))?;
        let kept = |memory: CudaStorage| tracked[3].then(|| cuda::tensor(memory, inner.clone()));
        if wanted == Wanted::Gradient {
            return Ok((gpu.zeros_impl(&shape.as_slice().into(), dtype)?, kept(activated)));
        }
        let (memory, y) = made(gpu, dtype, &shape)?;
        multiply(gpu, 1.0, Matrix::new(&h, hidden), Matrix::new(w2, hidden).transposed(), &y, Then::Bias(b2))?;
        Ok((memory, kept(activated)))
    })?;
    let y = Tensor::from_storage(Storage::Cuda(memory), shape, BackpropOp::none(), true);
    let back = Backward {
        tracked,
        x: x.clone(),
        weights: [w1.clone(), w2.clone()],
        before: cuda::tensor(before_memory, inner),
        activated,
    };
    tape::note(&all, &[&y], move |given| given[0].as_ref().map_or_else(|| Ok(Vec::new()), |dy| back.run(dy)));
    Ok(Some(y))
}

/// What the backward pass needs.
struct Backward {
    /// Which of x, W1, b1, W2, b2 want a gradient.
    tracked: [bool; 5],
    x: Tensor,
    weights: [Tensor; 2],
    before: Tensor,
    activated: Option<Tensor>,
}

impl Backward {
    /// Gradients of x, W1, b1, W2, b2.
    fn run(&self, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let Self { tracked, x, weights: [w1, w2], before, activated } = self;
        let (dtype, width, (out, hidden)) = (x.dtype(), w1.dim(1)?, w2.dims2()?);
        let dy = dy.contiguous()?;
        // Where nothing was kept nothing is read of it.
        let activated = activated.as_ref().unwrap_or(before);
        on_storage(&[&dy, x, w1, w2, before, activated], |parts| {
            let [dy, x, w1, w2, before, h] = &arrays::<6>(parts)?;
            let gpu = &parts[0].0.device;
            let of = |memory: CudaStorage, shape: &[usize]| Some(cuda::tensor(memory, shape));
            let sum = |d: &Array| Ok(of(sum_rows(gpu, Summand::Plain(d), 1)?, &[d.width()]));
            let weight = |d: &Array, x: &Array, shape: &[usize]| {
                let (d, x) = (Matrix::new(d, shape[0]).transposed(), Matrix::new(x, shape[1]));
                Ok(of(product(gpu, 1.0, d, x, dtype, shape)?.0, shape))
            };
            let when = |wanted: bool, f: &dyn Fn() -> Result<Option<Tensor>>| if wanted { f() } else { Ok(None) };
            let dw2 = when(tracked[3], &|| weight(dy, h, &w2.shape))?;
            let db2 = when(tracked[4], &|| sum(dy))?;
            if tracked[..3] == [false; 3] {
                return Ok(vec![None, None, None, dw2, db2]);
            }
            let (_memory, d) = made(gpu, dtype, &before.shape)?;
            multiply(gpu, 1.0, Matrix::new(dy, out), Matrix::new(w2, hidden), &d, Then::GeluSlope(before))?;
            let (a, b) = (Matrix::new(&d, hidden), Matrix::new(w1, width));
            let dx = when(tracked[0], &|| Ok(of(product(gpu, 1.0, a, b, dtype, &x.shape)?.0, &x.shape)))?;
            let dw1 = when(tracked[1], &|| weight(&d, x, &w1.shape))?;
            let db1 = when(tracked[2], &|| sum(&d))?;
            Ok(vec![dx, dw1, db1, dw2, db2])
        })
    }
}

/// Tensors of a GPU as arrays.
fn arrays<const N: usize>(parts: &[(&CudaStorage, &Layout)]) -> Result<[Array; N]> {
    let arrays = parts.iter().map(|&part| Ok(Input::new(part)?.array)).collect::<Result<Vec<_>>>()?;
    let count = arrays.len();
    arrays.try_into().or_else(|_| bail!("{count} tensors instead of {N}"))
}
