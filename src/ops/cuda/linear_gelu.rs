//! A linear layer and GELU on a GPU, in one pass.

use super::linear::shape_of_linear;
use super::{Input, OnGpu, made, on_storage};
use crate::cuda::product::{Matrix, Then, multiply};
use crate::cuda::reduce::{Summand, sum_rows};
use crate::cuda::{self, Gpu, elementwise};
use crate::ops::linear::Linear;
use crate::ops::linear_gelu::LinearGelu;
use candle_core::{CudaDevice, CudaStorage, Result};

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
