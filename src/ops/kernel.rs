//! A computation on the CPU: values in, values out, without a graph.

use super::float::{Float, vectorised};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};

/// A contiguous input: its values and its shape.
#[derive(Clone, Copy)]
pub(super) struct View<'a, F> {
    pub data: &'a [F],
    pub shape: &'a [usize],
}

impl<F> View<'_, F> {
    /// Length of the last dimension.
    pub fn last(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }
}

/// A computation on N contiguous inputs.
pub(super) trait Kernel<const N: usize>: Send + Sync + 'static {
    const NAME: &'static str;
    /// The output's values and shape.
    fn run<F: Float>(&self, inputs: [View<F>; N]) -> Result<(Vec<F>, Vec<usize>)>;
}

/// Runs a kernel on the CPU outside any graph. bf16 inputs are computed in f32.
pub(super) fn run<const N: usize, K: Kernel<N>>(kernel: &K, inputs: [&Tensor; N]) -> Result<Tensor> {
    let dtype = inputs[0].dtype();
    if dtype == DType::BF16 {
        let wide: Vec<Tensor> = inputs.iter().map(|t| t.detach().to_dtype(DType::F32)).collect::<Result<_>>()?;
        return run(kernel, std::array::from_fn(|i| &wide[i]))?.to_dtype(DType::BF16);
    }
    run_as(kernel, inputs, false)
}

/// The same for inputs that are not bf16; the result is a leaf of candle's graph if that is asked for.
pub(super) fn run_as<const N: usize, K: Kernel<N>>(kernel: &K, inputs: [&Tensor; N], is_leaf: bool) -> Result<Tensor> {
    let inputs: Vec<Tensor> = inputs.iter().map(|t| t.detach().contiguous()).collect::<Result<_>>()?;
    let guards: Vec<_> = inputs.iter().map(|t| t.storage_and_layout()).collect();
    let mut parts = Vec::with_capacity(N);
    for (storage, layout) in &guards {
        match &**storage {
            Storage::Cpu(cpu) => parts.push((cpu, *layout)),
            _ => bail!("{}: no kernel for this device", K::NAME),
        }
    }
    let (storage, shape) = on_cpu(kernel, std::array::from_fn(|i| parts[i]))?;
    let storage = Storage::Cpu(storage);
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), is_leaf))
}

/// Runs a kernel that has no derivative.
///
/// # Errors
/// An input is tracked: its gradient would be cut without a word.
pub(super) fn frozen<const N: usize, K: Kernel<N>>(kernel: &K, inputs: [&Tensor; N]) -> Result<Tensor> {
    refuse_tracked(K::NAME, &inputs)?;
    run(kernel, inputs)
}

/// Refuses inputs that want a gradient.
pub(super) fn refuse_tracked(name: &str, inputs: &[&Tensor]) -> Result<()> {
    match inputs.iter().any(|t| t.track_op()) {
        true => bail!("{name}: has no derivative, and an input wants one"),
        false => Ok(()),
    }
}

pub(super) fn on_cpu<const N: usize, K: Kernel<N>>(
    kernel: &K,
    inputs: [(&CpuStorage, &Layout); N],
) -> Result<(CpuStorage, Shape)> {
    fn views<'a, F: Float, const N: usize>(
        inputs: [(&'a CpuStorage, &'a Layout); N],
        name: &str,
    ) -> Result<[View<'a, F>; N]> {
        let mut out = [View { data: &[], shape: &[] }; N];
        for (view, (storage, layout)) in out.iter_mut().zip(inputs) {
            let Some((start, end)) = layout.contiguous_offsets() else { bail!("{name}: an input is not contiguous") };
            *view = View { data: &storage.as_slice::<F>()?[start..end], shape: layout.dims() };
        }
        Ok(out)
    }
    match inputs[0].0 {
        CpuStorage::F32(_) => {
            let (data, shape) = kernel.run(views::<f32, N>(inputs, K::NAME)?)?;
            Ok((CpuStorage::F32(data), shape.into()))
        }
        CpuStorage::F64(_) => {
            let (data, shape) = kernel.run(views::<f64, N>(inputs, K::NAME)?)?;
            Ok((CpuStorage::F64(data), shape.into()))
        }
        other => bail!("{}: {:?} is not supported", K::NAME, candle_core::backend::BackendStorage::dtype(other)),
    }
}

/// `f` on the values of a contiguous tensor on the CPU.
pub(super) fn with_view<F: Float, R>(tensor: &Tensor, f: impl FnOnce(View<F>) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(cpu), Some((start, end))) => {
            f(View { data: &cpu.as_slice::<F>()?[start..end], shape: layout.dims() })
        }
        _ => bail!("{tensor:?} is not contiguous on the CPU"),
    }
}

/// Fills `out` in pieces of `len` elements, in parallel, each compiled for this processor's vectors; `f` gets the
/// piece's number. A piece's values depend on its number only, so the number of threads changes nothing.
pub(super) fn fill<F: Float>(out: &mut [F], len: usize, f: impl Fn(usize, &mut [F]) + Sync) {
    use rayon::prelude::*;
    if candle_core::utils::get_num_threads() == 1 {
        out.chunks_mut(len.max(1)).enumerate().for_each(|(i, piece)| vectorised(|| f(i, piece)));
    } else {
        out.par_chunks_mut(len.max(1)).enumerate().for_each(|(i, piece)| vectorised(|| f(i, piece)));
    }
}
