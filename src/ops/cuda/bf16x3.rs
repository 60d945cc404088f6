//! Factors of adapters in halves on a GPU.

use super::{Input, OnGpu};
use crate::cuda::elementwise;
use crate::ops::bf16x3::Factor;
use candle_core::{CudaDevice, CudaStorage, Result};

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
