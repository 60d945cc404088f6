//! A real GPU: candle's device, its memory and its stream.

use super::gpu::{Argument, Array, Gpu, Launch};
use super::module;
use candle_core::cuda_backend::cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaDType, CudaStorage, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, DType, Layout, Result, Shape, Storage, Tensor, bail};
use half::bf16;

const MAJOR: CUdevice_attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
const SHARED_MEMORY: CUfunction_attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;

impl Gpu for CudaDevice {
    type Memory = CudaStorage;

    fn allocate(&self, dtype: DType, len: usize) -> Result<CudaStorage> {
        // The driver allocates no empty memory.
        let len = len.max(1);
        // SAFETY: whoever asks for memory has it filled by a kernel or a copy before anything reads it.
        unsafe {
            Ok(match dtype {
                DType::F32 => CudaStorage::wrap_cuda_slice(self.alloc::<f32>(len)?, self.clone()),
                DType::BF16 => CudaStorage::wrap_cuda_slice(self.alloc::<bf16>(len)?, self.clone()),
                DType::F64 => CudaStorage::wrap_cuda_slice(self.alloc::<f64>(len)?, self.clone()),
                DType::U32 => CudaStorage::wrap_cuda_slice(self.alloc::<u32>(len)?, self.clone()),
                DType::U8 => CudaStorage::wrap_cuda_slice(self.alloc::<u8>(len)?, self.clone()),
                other => bail!("no memory for {}", other.as_str()),
            })
        }
    }

    fn array(&self, memory: &CudaStorage, _: DType, shape: &[usize]) -> Result<Array> {
        array(memory, &Layout::contiguous(shape))
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let stream = self.cuda_stream();
        let function = module::kernel(stream.context(), launch.file, launch.kernel)?;
        let shared = launch.shared as u32;
        if shared > 0 {
            // Above 48 KiB a kernel gets only what it was promised.
            function.set_attribute(SHARED_MEMORY, shared as i32).w()?;
        }
        let mut builder = stream.launch_builder(&function);
        for argument in launch.arguments {
            match argument {
                Argument::Pointer(number) | Argument::Size(number) => builder.arg(number),
                Argument::Int(number) => builder.arg(number),
                Argument::Real(number) => builder.arg(number),
            };
        }
        let three = |[x, y, z]: [usize; 3]| (x as u32, y as u32, z as u32);
        let (grid_dim, block_dim) = (three(launch.grid), three(launch.threads));
        // SAFETY: the operations of this module give each kernel the arguments that its source declares, and arrays of the
        // sizes it is told; tests/cuda_kernels runs every one of them, on the CPU.
        unsafe { builder.launch(LaunchConfig { grid_dim, block_dim, shared_mem_bytes: shared }) }.w()?;
        Ok(())
    }

    fn is_hopper(&self) -> Result<bool> {
        // The driver knows without asking the GPU.
        Ok(self.cuda_stream().context().attribute(MAJOR).w()? == 9)
    }
}

/// A contiguous tensor's memory; work on it has to be given to candle's stream.
pub(crate) fn array(storage: &CudaStorage, layout: &Layout) -> Result<Array> {
    fn pointer<T: CudaDType>(storage: &CudaStorage) -> Result<u64> {
        let slice = storage.as_cuda_slice::<T>()?;
        Ok(slice.device_ptr(slice.stream()).0)
    }
    if !layout.is_contiguous() {
        bail!("an array of the GPU is not contiguous: {layout:?}");
    }
    let dtype = candle_core::backend::BackendStorage::dtype(storage);
    let start = match dtype {
        DType::F32 => pointer::<f32>(storage)?,
        DType::BF16 => pointer::<bf16>(storage)?,
        DType::F64 => pointer::<f64>(storage)?,
        DType::U32 => pointer::<u32>(storage)?,
        DType::U8 => pointer::<u8>(storage)?,
        other => bail!("no kernel takes {}", other.as_str()),
    };
    let pointer = start + (layout.start_offset() * dtype.size_in_bytes()) as u64;
    Ok(Array { pointer, dtype, shape: layout.dims().to_vec() })
}

/// A tensor without a graph.
pub(crate) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}
