//! Linear layers on a GPU, with what belongs to them: products by cuBLASLt (crate::cuda::product).

use super::{Input, OnGpu, made, on_storage};
use crate::cuda::product::{Matrix, Then, multiply};
use crate::cuda::reduce::{Summand, sum_rows};
use crate::cuda::{self, Array, Gpu, elementwise};
use crate::ops::Wanted;
use crate::ops::bf16x3::Factor;
use crate::ops::linear::{Linear, with_last};
use crate::ops::linear_gelu::LinearGelu;
use crate::ops::low_rank::LowRank;
use candle_core::backend::BackendDevice;
use candle_core::{CudaDevice, CudaStorage, DType, Result, bail};

/// `factor a b` as an array of `shape`.
pub(in crate::ops) fn product(
    gpu: &CudaDevice,
    factor: f64,
    a: Matrix,
    b: Matrix,
    dtype: DType,
    shape: &[usize],
) -> Result<(CudaStorage, Array)> {
    let (memory, y) = made(gpu, dtype, shape)?;
    multiply(gpu, factor as f32, a, b, &y, Then::Store)?;
    Ok((memory, y))
}

/// Zeros as an array of `shape`.
fn zeros(gpu: &CudaDevice, dtype: DType, shape: &[usize]) -> Result<(CudaStorage, Array)> {
    let memory = gpu.zeros_impl(&shape.into(), dtype)?;
    let array = gpu.array(&memory, dtype, shape)?;
    Ok((memory, array))
}

impl Linear {
    fn on_gpu(&self, gpu: &CudaDevice, x: &Array, w: &Array, bias: Option<&Array>) -> Result<(CudaStorage, Array)> {
        let (shape, in_dim) = shape_of_linear(x, w)?;
        if self.0 == Wanted::Gradient {
            return zeros(gpu, x.dtype, &shape);
        }
        let (memory, y) = made(gpu, x.dtype, &shape)?;
        let then = bias.map_or(Then::Store, Then::Bias);
        multiply(gpu, 1.0, Matrix::new(x, in_dim), Matrix::new(w, in_dim).transposed(), &y, then)?;
        Ok((memory, y))
    }

    /// Gradients of x `dy W` and W `dy^T x`.
    fn products(
        gpu: &CudaDevice,
        x: &Array,
        w: &Array,
        dy: &Array,
        wanted: [bool; 2],
    ) -> Result<[Option<CudaStorage>; 2]> {
        let (out_dim, in_dim) = (w.shape[0], w.shape[1]);
        let (d, w_matrix, x_matrix) = (Matrix::new(dy, out_dim), Matrix::new(w, in_dim), Matrix::new(x, in_dim));
        let dx = || product(gpu, 1.0, d, w_matrix, x.dtype, &x.shape).map(|(memory, _)| memory);
        let dw = || product(gpu, 1.0, d.transposed(), x_matrix, x.dtype, &w.shape).map(|(memory, _)| memory);
        Ok([wanted[0].then(dx).transpose()?, wanted[1].then(dw).transpose()?])
    }
}

/// The shape of x W^T, and the width of x.
fn shape_of_linear(x: &Array, w: &Array) -> Result<(Vec<usize>, usize)> {
    let &[out_dim, in_dim] = &w.shape[..] else { bail!("linear: the weight has shape {:?}, not [out, in]", w.shape) };
    if x.width() != in_dim {
        bail!("linear: input {:?} does not fit weight {:?}", x.shape, w.shape);
    }
    Ok((with_last(&x.shape, out_dim), in_dim))
}

impl OnGpu<2> for Linear {
    fn forward(&self, gpu: &CudaDevice, [x, w]: [&Input; 2]) -> Result<(CudaStorage, Vec<usize>)> {
        let (memory, y) = self.on_gpu(gpu, &x.array, &w.array, None)?;
        Ok((memory, y.shape))
    }
    fn backward(
        &self,
        gpu: &CudaDevice,
        [x, w]: [&Input; 2],
        _: &Input,
        dy: &Input,
        wanted: [bool; 2],
    ) -> Result<[Option<CudaStorage>; 2]> {
        Self::products(gpu, &x.array, &w.array, &dy.array, wanted)
    }
}

impl OnGpu<3> for Linear {
    fn forward(&self, gpu: &CudaDevice, [x, w, bias]: [&Input; 3]) -> Result<(CudaStorage, Vec<usize>)> {
        let (memory, y) = self.on_gpu(gpu, &x.array, &w.array, Some(&bias.array))?;
        Ok((memory, y.shape))
    }
    fn backward(
        &self,
        gpu: &CudaDevice,
        [x, w, _]: [&Input; 3],
        _: &Input,
        dy: &Input,
        wanted: [bool; 3],
    ) -> Result<[Option<CudaStorage>; 3]> {
        let [dx, dw] = Self::products(gpu, &x.array, &w.array, &dy.array, [wanted[0], wanted[1]])?;
        let sum = || sum_rows(gpu, Summand::Plain(&dy.array), 1);
        Ok([dx, dw, wanted[2].then(sum).transpose()?])
    }
}

impl OnGpu<3> for LinearGelu {
    fn forward(&self, gpu: &CudaDevice, [x, w, bias]: [&Input; 3]) -> Result<(CudaStorage, Vec<usize>)> {
        let (x, w, bias) = (&x.array, &w.array, &bias.array);
        let (shape, in_dim) = shape_of_linear(x, w)?;
        let (memory, y) = made(gpu, x.dtype, &shape)?;
        let (a, b) = (Matrix::new(x, in_dim), Matrix::new(w, in_dim).transposed());
        if !self.is_tracked {
            multiply(gpu, 1.0, a, b, &y, Then::BiasGelu(bias, None))?;
            return Ok((memory, shape));
        }
        let (before_memory, before) = made(gpu, x.dtype, &shape)?;
        multiply(gpu, 1.0, a, b, &y, Then::BiasGelu(bias, Some(&before)))?;
        // An operation is applied once.
        let _ = self.before.set(cuda::tensor(before_memory, shape.clone()));
        Ok((memory, shape))
    }
    fn backward(
        &self,
        gpu: &CudaDevice,
        [x, w, _]: [&Input; 3],
        _: &Input,
        dy: &Input,
        wanted: [bool; 3],
    ) -> Result<[Option<CudaStorage>; 3]> {
        on_storage(&[self.before()?], |parts| {
            let before = Input::new(parts[0])?.array;
            let memory = elementwise::activation_backward(gpu, "gelu", &before, &dy.array)?;
            let d = gpu.array(&memory, before.dtype, &before.shape)?;
            let [dx, dw] = Linear::products(gpu, &x.array, &w.array, &d, [wanted[0], wanted[1]])?;
            let sum = || sum_rows(gpu, Summand::Plain(&d), 1);
            Ok([dx, dw, wanted[2].then(sum).transpose()?])
        })
    }
}

impl OnGpu<1> for Factor {
    fn forward(&self, gpu: &CudaDevice, [x]: [&Input; 1]) -> Result<(CudaStorage, Vec<usize>)> {
        let shape = &x.array.shape;
        Ok((elementwise::bf16x3(gpu, &x.array, self.width(shape), self.low())?, self.tripled(shape)?))
    }
    fn backward(
        &self,
        gpu: &CudaDevice,
        [x]: [&Input; 1],
        _: &Input,
        dy: &Input,
        _: [bool; 1],
    ) -> Result<[Option<CudaStorage>; 1]> {
        Ok([Some(elementwise::bf16x3_backward(gpu, &dy.array, self.width(&x.array.shape), self.low())?)])
    }
}

impl OnGpu<3> for LowRank {
    fn forward(&self, gpu: &CudaDevice, [x, a, b]: [&Input; 3]) -> Result<(CudaStorage, Vec<usize>)> {
        let (projected_memory, projected) = Linear(Wanted::Value).on_gpu(gpu, &x.array, &a.array, None)?;
        let y = on_storage(&[&self.weight, self.bias.as_ref().unwrap_or(&self.weight)], |parts| {
            let (x, weight, bias) = (&x.array, Input::new(parts[0])?.array, Input::new(parts[1])?.array);
            let (shape, in_dim) = shape_of_linear(x, &weight)?;
            if self.wanted == Wanted::Gradient {
                return Ok((zeros(gpu, x.dtype, &shape)?.0, shape));
            }
            // The adapter's part first. What it adds is less than the last bit of the layer's while it is young: added to a
            // layer that has been rounded it would be lost.
            let rank = projected.width();
            let (left, right) = (Matrix::new(&projected, rank), Matrix::new(&b.array, rank).transposed());
            let (memory, y) = product(gpu, self.scale, left, right, x.dtype, &shape)?;
            let then = if self.bias.is_some() { Then::BiasOnto(&bias, &y) } else { Then::Add };
            multiply(gpu, 1.0, Matrix::new(x, in_dim), Matrix::new(&weight, in_dim).transposed(), &y, then)?;
            Ok((memory, shape))
        })?;
        // An operation is applied once.
        let _ = self.projected.set(cuda::tensor(projected_memory, projected.shape));
        Ok(y)
    }
    fn backward(
        &self,
        gpu: &CudaDevice,
        [x, a, b]: [&Input; 3],
        _: &Input,
        dy: &Input,
        wanted: [bool; 3],
    ) -> Result<[Option<CudaStorage>; 3]> {
        let (x, a, b, dy) = (&x.array, &a.array, &b.array, &dy.array);
        let (width, rank, dtype) = (x.width(), a.shape[0], dy.dtype);
        let gradient = Matrix::new(dy, b.shape[0]);
        let shape = with_last(&dy.shape, rank);
        let (_memory, d) = product(gpu, self.scale, gradient, Matrix::new(b, rank), dtype, &shape)?; // of x A^T
        let d = Matrix::new(&d, rank);
        on_storage(&[&self.weight, self.projected()?], |parts| {
            let (weight, projected) = (Input::new(parts[0])?.array, Input::new(parts[1])?.array);
            let dx = || {
                let (memory, dx) = product(gpu, 1.0, d, Matrix::new(a, width), dtype, &x.shape)?; // first, as above
                multiply(gpu, 1.0, gradient, Matrix::new(&weight, width), &dx, Then::Add).map(|()| memory)
            };
            let da =
                || product(gpu, 1.0, d.transposed(), Matrix::new(x, width), dtype, &a.shape).map(|(memory, _)| memory);
            let projected = Matrix::new(&projected, rank);
            let db = || {
                product(gpu, self.scale, gradient.transposed(), projected, dtype, &b.shape).map(|(memory, _)| memory)
            };
            Ok([wanted[0].then(dx).transpose()?, wanted[1].then(da).transpose()?, wanted[2].then(db).transpose()?])
        })
    }
}
