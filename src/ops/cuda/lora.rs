//! A frozen linear layer and the adapter beside it on a GPU.

use super::linear::{product, shape_of_linear, zeros};
use super::{Input, OnGpu, on_storage};
use crate::cuda;
use crate::cuda::product::{Matrix, Then, multiply};
use crate::ops::Wanted;
use crate::ops::linear::{Linear, with_last};
use crate::ops::lora::Lora;
use candle_core::{CudaDevice, CudaStorage, Result};

impl OnGpu<3> for Lora {
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
