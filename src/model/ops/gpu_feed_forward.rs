//! [`super::feed_forward`] on a GPU.

use super::gpu::{Input, made, on_storage};
use super::linear::with_last;
use super::{Wanted, tape};
use crate::cuda::product::{Matrix, Then, multiply};
use crate::cuda::{self, Array};
use candle_core::backend::BackendDevice;
use candle_core::op::BackpropOp;
use candle_core::{Result, Storage, Tensor, bail};

/// Of frozen W1, b1, W2, b2, where x wants a gradient and a tape runs; else nothing.
pub(super) fn feed_forward(x: &Tensor, frozen: [&Tensor; 4], wanted: Wanted) -> Result<Option<Tensor>> {
    let fits = |t: &Tensor| t.is_contiguous() && t.dtype() == x.dtype() && t.device().is_cuda();
    if !fits(x) || !x.track_op() || !tape::is_running() || !frozen.iter().all(|t| fits(t) && !t.track_op()) {
        return Ok(None);
    }
    let [w1, b1, w2, b2] = frozen;
    let ((hidden, width), (out, second_width)) = (w1.dims2()?, w2.dims2()?);
    if second_width != hidden || x.dims().last() != Some(&width) {
        bail!("feed_forward: {w1:?} and {w2:?} do not fit {x:?}");
    }
    let (gpu, dtype) = (x.device().as_cuda_device()?, x.dtype());
    let (shape, inner) = (with_last(x.dims(), out), with_last(x.dims(), hidden));
    let (before_memory, before) = made(gpu, dtype, &inner)?;
    let memory = on_storage(&[x, w1, b1, w2, b2], |parts| {
        let arrays = parts.iter().map(|&part| Ok(Input::new(part)?.array)).collect::<Result<Vec<Array>>>()?;
        let [x, w1, b1, w2, b2] = &arrays[..] else { bail!("feed_forward: five tensors") };
        let (a, b) = (Matrix::new(x, width), Matrix::new(w1, width).transposed());
        if wanted == Wanted::Gradient {
            multiply(gpu, 1.0, a, b, &before, Then::Bias(b1))?;
            return gpu.zeros_impl(&shape.as_slice().into(), dtype);
        }
        let (_memory, h) = made(gpu, dtype, &inner)?;
        multiply(gpu, 1.0, a, b, &h, Then::BiasGelu(b1, Some(&before)))?;
        let (memory, y) = made(gpu, dtype, &shape)?;
        multiply(gpu, 1.0, Matrix::new(&h, hidden), Matrix::new(w2, hidden).transposed(), &y, Then::Bias(b2))?;
        Ok(memory)
    })?;
    let y = Tensor::from_storage(Storage::Cuda(memory), shape, BackpropOp::none(), true);
    let before = cuda::tensor(before_memory, inner);
    let (w1, w2, x_shape) = (w1.clone(), w2.clone(), x.dims().to_vec());
    tape::note(&[x], &[&y], move |given| {
        let Some(dy) = &given[0] else { return Ok(Vec::new()) };
        let dx = on_storage(&[&dy.contiguous()?, &w1, &w2, &before], |parts| {
            let arrays = parts.iter().map(|&part| Ok(Input::new(part)?.array)).collect::<Result<Vec<Array>>>()?;
            let [dy, w1, w2, before] = &arrays[..] else { bail!("feed_forward: four tensors") };
            let gpu = &parts[0].0.device;
            let (_memory, d) = made(gpu, dtype, &before.shape)?;
            multiply(gpu, 1.0, Matrix::new(dy, out), Matrix::new(w2, hidden), &d, Then::GeluSlope(before))?;
            let (memory, dx) = made(gpu, dtype, &x_shape)?;
            multiply(gpu, 1.0, Matrix::new(&d, hidden), Matrix::new(w1, width), &dx, Then::Store)?;
            Ok(cuda::tensor(memory, x_shape.as_slice()))
        })?;
        Ok(vec![Some(dx)])
    });
    Ok(Some(y))
}
