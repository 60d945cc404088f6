//! Norms on a GPU.

use super::{Input, OnGpu};
use crate::cuda::norm;
use crate::ops::norm::{LayerNormModulate, RmsNorm};
use candle_core::{CudaDevice, CudaStorage, Result};

impl OnGpu<3> for LayerNormModulate {
    fn forward(&self, gpu: &CudaDevice, [x, shift, scale]: [&Input; 3]) -> Result<(CudaStorage, Vec<usize>)> {
        let out = norm::layer_norm_modulate(gpu, &x.array, &shift.array, &scale.array, self.eps as f32)?;
        Ok((out, x.array.shape.clone()))
    }
    fn backward(
        &self,
        gpu: &CudaDevice,
        [x, _, scale]: [&Input; 3],
        _: &Input,
        dy: &Input,
        wanted: [bool; 3],
    ) -> Result<[Option<CudaStorage>; 3]> {
        let (eps, modulation) = (self.eps as f32, wanted[1] || wanted[2]);
        let (x, scale, dy) = (&x.array, &scale.array, &dy.array);
        norm::layer_norm_modulate_backward(gpu, x, scale, dy, eps, modulation)
    }
}

impl OnGpu<2> for RmsNorm {
    fn forward(&self, gpu: &CudaDevice, [x, weight]: [&Input; 2]) -> Result<(CudaStorage, Vec<usize>)> {
        Ok((norm::rms_norm(gpu, &x.array, &weight.array, self.eps as f32)?, x.array.shape.clone()))
    }
    fn backward(
        &self,
        gpu: &CudaDevice,
        [x, weight]: [&Input; 2],
        _: &Input,
        dy: &Input,
        wanted: [bool; 2],
    ) -> Result<[Option<CudaStorage>; 2]> {
        let eps = self.eps as f32;
        let (dx, dweight) = norm::rms_norm_backward(gpu, &x.array, &weight.array, &dy.array, eps, wanted[1])?;
        Ok([Some(dx), dweight])
    }
}
