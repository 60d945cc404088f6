//! Linear layers on a GPU: products by cuBLASLt (crate::cuda::product).

use super::{Input, OnGpu, made};
use crate::cuda::product::{Matrix, Then, multiply};
use crate::cuda::reduce::{Summand, sum_rows};
use crate::cuda::{Array, Gpu};
use crate::ops::Wanted;
use crate::ops::linear::{Linear, with_last};
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
pub(super) fn zeros(gpu: &CudaDevice, dtype: DType, shape: &[usize]) -> Result<(CudaStorage, Array)> {
    let memory = gpu.zeros_impl(&shape.into(), dtype)?;
    let array = gpu.array(&memory, dtype, shape)?;
    Ok((memory, array))
}

impl Linear {
    pub(super) fn on_gpu(
        &self,
        gpu: &CudaDevice,
        x: &Array,
        w: &Array,
        bias: Option<&Array>,
    ) -> Result<(CudaStorage, Array)> {
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
    pub(super) fn products(
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
pub(super) fn shape_of_linear(x: &Array, w: &Array) -> Result<(Vec<usize>, usize)> {
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
