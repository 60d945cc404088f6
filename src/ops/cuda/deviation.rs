//! Deviations of velocities on a GPU.

use super::{Input, OnGpu};
use crate::cuda::deviation;
use crate::ops::deviation::Deviations;
use candle_core::{CudaDevice, CudaStorage, Result};

impl OnGpu<3> for Deviations {
    fn forward(&self, gpu: &CudaDevice, [v, others, factors]: [&Input; 3]) -> Result<(CudaStorage, Vec<usize>)> {
        let sums = deviation::sums(gpu, &v.array, &others.array, &factors.array)?;
        Ok((sums, vec![factors.array.shape[0], factors.array.shape[1], 2]))
    }
    fn backward(
        &self,
        gpu: &CudaDevice,
        [v, others, factors]: [&Input; 3],
        _: &Input,
        d: &Input,
        _: [bool; 3],
    ) -> Result<[Option<CudaStorage>; 3]> {
        let dv = deviation::backward(gpu, &v.array, &others.array, &factors.array, &d.array)?;
        Ok([Some(dv), None, None])
    }
}
