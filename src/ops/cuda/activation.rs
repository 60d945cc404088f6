//! Activations on a GPU.

use super::{Input, OnGpu};
use crate::cuda::elementwise;
use crate::ops::activation::{Forward, Gated};
use candle_core::{CudaDevice, CudaStorage, Result};

impl<G: Gated> OnGpu<1> for Forward<G> {
    fn forward(&self, gpu: &CudaDevice, [x]: [&Input; 1]) -> Result<(CudaStorage, Vec<usize>)> {
        Ok((elementwise::activation(gpu, G::NAME, &x.array)?, x.array.shape.clone()))
    }
    fn backward(
        &self,
        gpu: &CudaDevice,
        [x]: [&Input; 1],
        _: &Input,
        dy: &Input,
        _: [bool; 1],
    ) -> Result<[Option<CudaStorage>; 1]> {
        Ok([Some(elementwise::activation_backward(gpu, G::NAME, &x.array, &dy.array)?)])
    }
}
