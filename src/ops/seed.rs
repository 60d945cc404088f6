//! The start of a backward pass with a given gradient.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &candle_core::CudaStorage, _: &Layout) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendDevice;
        Ok((storage.device.zeros_impl(&Shape::from(()), candle_core::DType::F32)?, Shape::from(())))
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// A scalar whose backward pass gives `x` the gradient `grad` (of x's shape), with no arithmetic. Seeds of several
/// tensors may be added up and run back together.
pub fn seed(x: &Tensor, grad: &Tensor) -> Result<Tensor> {
    x.apply_op1(Seed(grad.clone()))
}
