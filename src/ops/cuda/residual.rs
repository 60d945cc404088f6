//! The gated residual on a GPU.

use super::{Input, OnGpu};
use crate::cuda::elementwise;
use crate::ops::residual::GatedResidual;
use candle_core::{CudaDevice, CudaStorage, Result};

impl OnGpu<3> for GatedResidual {
    const THROUGH: Option<usize> = Some(0);

    fn forward(&self, gpu: &CudaDevice, [x, gate, y]: [&Input; 3]) -> Result<(CudaStorage, Vec<usize>)> {
        Ok((elementwise::gated_residual(gpu, &x.array, &gate.array, &y.array)?, x.array.shape.clone()))
    }
    fn backward(
        &self,
        gpu: &CudaDevice,
        [_, gate, y]: [&Input; 3],
        _: &Input,
        d: &Input,
        wanted: [bool; 3],
    ) -> Result<[Option<CudaStorage>; 3]> {
        let (dgate, dy) = elementwise::gated_residual_backward(gpu, &gate.array, &y.array, &d.array, wanted[1])?;
        Ok([None, dgate, Some(dy)])
    }
}
