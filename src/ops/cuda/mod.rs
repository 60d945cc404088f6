//! The operations on a GPU: our kernels (crate::cuda); what multiplies matrices stands in linear, feed_forward and picture.
//! f32 or bf16 in memory, f32 in arithmetic.

pub(in crate::ops) mod feed_forward;
mod linear;
mod picture;
pub(in crate::ops) mod shape;

use crate::cuda::{self, Array, Gpu, attention, deviation, elementwise, norm};
use crate::ops::activation::{Forward, Gated};
use crate::ops::attention::Attention;
use crate::ops::deviation::Deviations;
use crate::ops::norm::{LayerNormModulate, RmsNorm};
use crate::ops::op::{Differentiable, Kernel};
use crate::ops::residual::GatedResidual;
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

pub(in crate::ops) use picture::{convolution, group_norm};
pub(in crate::ops) use shape::{joined, part, rms_norm_joined};

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
pub(in crate::ops) fn forward<const N: usize, K: Differentiable<N>>(
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
pub(in crate::ops) fn value<const N: usize, K: Differentiable<N>>(
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
pub(in crate::ops) fn gradients<const N: usize, K: Differentiable<N>>(
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

/// `[B]` to `[B, 2 half]`: see [`crate::ops::time_features`].
pub(in crate::ops) fn time_features(t: &Tensor, half: usize) -> Result<Tensor> {
    let t = t.detach().to_dtype(DType::F32)?.contiguous()?;
    on_storage(&[&t], |parts| {
        let input = Input::new(parts[0])?;
        let features = elementwise::time_features(&input.storage.device, &input.array, half)?;
        Ok(cuda::tensor(features, (t.dim(0)?, 2 * half)))
    })
}

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

/// A new result of a shape.
pub(in crate::ops) fn made(gpu: &CudaDevice, dtype: DType, shape: &[usize]) -> Result<(CudaStorage, Array)> {
    let memory = gpu.allocate(dtype, shape.iter().product())?;
    let array = gpu.array(&memory, dtype, shape)?;
    Ok((memory, array))
}
