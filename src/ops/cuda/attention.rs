//! Attention on a GPU.

use super::{Input, OnGpu, on_storage};
use crate::cuda::{self, attention};
use crate::ops::attention::Attention;
use candle_core::{CudaDevice, CudaStorage, Result, bail};

impl OnGpu<3> for Attention {
    fn forward(&self, gpu: &CudaDevice, [q, k, v]: [&Input; 3]) -> Result<(CudaStorage, Vec<usize>)> {
        let [out, lse] = attention::attention(gpu, &q.array, &k.array, &v.array)?;
        let shape = &q.array.shape;
        // An operation is applied once.
        let _ = self.lse.set(cuda::tensor(lse, (shape[0], shape[2], shape[1])));
        Ok((out, shape.clone()))
    }
    fn backward(
        &self,
        gpu: &CudaDevice,
        [q, k, v]: [&Input; 3],
        output: &Input,
        dy: &Input,
        _: [bool; 3],
    ) -> Result<[Option<CudaStorage>; 3]> {
        let Some(lse) = self.lse.get() else { bail!("attention: the backward pass comes before the forward pass") };
        on_storage(&[lse], |parts| {
            let lse = Input::new(parts[0])?;
            let (q, k, v, out, d_out) = (&q.array, &k.array, &v.array, &output.array, &dy.array);
            Ok(attention::Backward { q, k, v, out, lse: &lse.array, d_out }.run(gpu)?.map(Some))
        })
    }
}
