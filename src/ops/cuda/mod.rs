//! The operations on a GPU: our kernels and cuBLASLt's products (`crate::cuda`). f32 or bf16 in memory, f32 in arithmetic.
//!
//! A file here is the GPU's half of the operation of that name. Here stands what all of them share.

mod activation;
mod attention;
mod bf16x3;
mod convolution;
mod deviation;
mod feed_forward;
mod group_norm;
mod linear;
mod linear_gelu;
mod lora;
mod norm;
mod residual;
mod rms_norm_joined;
mod shape;
mod sum;
mod time;

pub(super) use convolution::convolution;
pub(super) use feed_forward::feed_forward;
pub(super) use group_norm::group_norm;
pub(super) use rms_norm_joined::rms_norm_joined;
pub(super) use shape::{joined, part};
pub(super) use sum::sum;
pub(super) use time::time_features;

use super::kernel::Kernel;
use crate::cuda::{self, Array, Gpu};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};

/// A contiguous tensor on a GPU.
pub(in crate::ops) struct Input<'a> {
    storage: &'a CudaStorage,
    pub(in crate::ops) array: Array,
}

impl<'a> Input<'a> {
    pub(in crate::ops) fn new((storage, layout): (&'a CudaStorage, &'a Layout)) -> Result<Self> {
        Ok(Self { storage, array: cuda::array(storage, layout)? })
    }
}

/// An operation on a GPU.
pub(in crate::ops) trait OnGpu<const N: usize> {
    /// The input, if there is one, whose gradient is the result's as it is.
    const THROUGH: Option<usize> = None;
    /// The result and its shape.
    fn forward(&self, gpu: &CudaDevice, inputs: [&Input; N]) -> Result<(CudaStorage, Vec<usize>)>;
    /// Gradients of the other inputs, those at least that are wanted.
    fn backward(
        &self,
        gpu: &CudaDevice,
        inputs: [&Input; N],
        output: &Input,
        dy: &Input,
        wanted: [bool; N],
    ) -> Result<[Option<CudaStorage>; N]>;
}

/// The forward pass inside candle's graph.
pub(in crate::ops) fn forward<const N: usize, K: Kernel<N> + OnGpu<N>>(
    kernel: &K,
    inputs: [(&CudaStorage, &Layout); N],
) -> Result<(CudaStorage, Shape)> {
    let inputs = inputs.into_iter().map(Input::new).collect::<Result<Vec<_>>>()?;
    if inputs.iter().any(|input| input.array.dtype != inputs[0].array.dtype) {
        bail!("{}: inputs of different types", <K as Kernel<N>>::NAME);
    }
    let (storage, shape) = OnGpu::forward(kernel, &inputs[0].storage.device, std::array::from_fn(|i| &inputs[i]))?;
    Ok((storage, shape.into()))
}

/// The forward pass outside any graph, or with a leaf of candle's as its result.
pub(in crate::ops) fn value<const N: usize, K: Kernel<N> + OnGpu<N>>(
    kernel: &K,
    inputs: [&Tensor; N],
    is_leaf: bool,
) -> Result<Tensor> {
    on_storage(&inputs, |parts| {
        let (storage, shape) = forward(kernel, std::array::from_fn(|i| parts[i]))?;
        Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), is_leaf))
    })
}

/// Gradients of the inputs, those that are tracked.
pub(in crate::ops) fn gradients<const N: usize, K: Kernel<N> + OnGpu<N>>(
    kernel: &K,
    inputs: [&Tensor; N],
    output: &Tensor,
    dy_as_it_is: &Tensor,
) -> Result<[Option<Tensor>; N]> {
    let tensors: Vec<&Tensor> = inputs.iter().copied().chain([output, dy_as_it_is]).collect();
    on_storage(&tensors, |parts| {
        let all = parts.iter().map(|&part| Input::new(part)).collect::<Result<Vec<_>>>()?;
        let wanted = inputs.map(Tensor::track_op);
        let gpu = &all[0].storage.device;
        let (output, dy) = (&all[N], &all[N + 1]);
        let gradients = OnGpu::backward(kernel, gpu, std::array::from_fn(|i| &all[i]), output, dy, wanted)?;
        let mut gradients = gradients.into_iter();
        Ok(std::array::from_fn(|i| {
            let gradient = gradients.next().flatten();
            match (wanted[i], K::THROUGH == Some(i)) {
                (false, _) => None,
                (true, true) => Some(dy_as_it_is.clone()),
                (true, false) => Some(cuda::tensor(gradient?, inputs[i].shape())),
            }
        }))
    })
}

/// `f` on the memory of tensors of a GPU.
pub(in crate::ops) fn on_storage<R>(
    tensors: &[&Tensor],
    f: impl FnOnce(&[(&CudaStorage, &Layout)]) -> Result<R>,
) -> Result<R> {
    let guards: Vec<_> = tensors.iter().map(|t| t.storage_and_layout()).collect();
    let mut parts = Vec::with_capacity(guards.len());
    for (storage, layout) in &guards {
        match &**storage {
            Storage::Cuda(cuda) => parts.push((cuda, *layout)),
            _ => bail!("tensors of an operation lie on different devices"),
        }
    }
    f(&parts)
}

/// A new result of a shape.
pub(in crate::ops) fn made(gpu: &CudaDevice, dtype: DType, shape: &[usize]) -> Result<(CudaStorage, Array)> {
    let memory = gpu.allocate(dtype, shape.iter().product())?;
    let array = gpu.array(&memory, dtype, shape)?;
    Ok((memory, array))
}
