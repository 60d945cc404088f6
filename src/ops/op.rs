//! The bridge between our kernels and candle's graph.

use super::float::{Float, vectorised};
use super::tape;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail};

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

/// The same computation on a GPU, where this program can use one.
#[cfg(feature = "cuda")]
pub(super) use super::cuda::OnGpu;
#[cfg(not(feature = "cuda"))]
pub(super) trait OnGpu<const N: usize> {}
#[cfg(not(feature = "cuda"))]
impl<K, const N: usize> OnGpu<N> for K {}

/// A kernel with a derivative.
pub(super) trait Differentiable<const N: usize>: Kernel<N> + OnGpu<N> {
    /// Gradients of the inputs, those that are tracked, on the CPU; `dy` is contiguous.
    fn backward(&self, inputs: [&Tensor; N], output: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; N]>;
}

/// The value, on whatever device the inputs are: outside any graph, or as a leaf of candle's.
fn value<const N: usize, K: Differentiable<N>>(kernel: &K, inputs: [&Tensor; N], is_leaf: bool) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if inputs[0].device().is_cuda() {
        return super::cuda::value(kernel, inputs, is_leaf);
    }
    run_as(kernel, inputs, is_leaf)
}

/// The gradients, on whatever device the inputs are.
fn gradients<const N: usize, K: Differentiable<N>>(
    kernel: &K,
    inputs: [&Tensor; N],
    output: &Tensor,
    dy: &Tensor,
) -> Result<[Option<Tensor>; N]> {
    let dy = dy.contiguous()?;
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return super::cuda::gradients(kernel, inputs, output, &dy);
    }
    Differentiable::backward(kernel, inputs, output, &dy)
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
fn run_as<const N: usize, K: Kernel<N>>(kernel: &K, inputs: [&Tensor; N], is_leaf: bool) -> Result<Tensor> {
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
    Ok(Tensor::from_storage(storage, shape, candle_core::op::BackpropOp::none(), is_leaf))
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

fn on_cpu<const N: usize, K: Kernel<N>>(
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

struct Recorded<K>(K);

macro_rules! custom_op {
    ($trait:ident, $n:literal, [$($storage:ident $layout:ident $arg:ident),+], $out:ty) => {
        impl<K: Differentiable<$n>> $trait for Recorded<K> {
            fn name(&self) -> &'static str {
                K::NAME
            }
            fn cpu_fwd(&self, $($storage: &CpuStorage, $layout: &Layout),+) -> Result<(CpuStorage, Shape)> {
                on_cpu(&self.0, [$(($storage, $layout)),+])
            }
            #[cfg(feature = "cuda")]
            fn cuda_fwd(
                &self,
                $($storage: &candle_core::CudaStorage, $layout: &Layout),+
            ) -> Result<(candle_core::CudaStorage, Shape)> {
                super::cuda::forward(&self.0, [$(($storage, $layout)),+])
            }
            fn bwd(&self, $($arg: &Tensor,)+ output: &Tensor, dy: &Tensor) -> Result<$out> {
                let [$($arg),+] = gradients(&self.0, [$($arg),+], output, dy)?;
                Ok(($($arg),+))
            }
        }
    };
}
custom_op!(CustomOp1, 1, [s1 l1 a], Option<Tensor>);
custom_op!(CustomOp2, 2, [s1 l1 a, s2 l2 b], (Option<Tensor>, Option<Tensor>));
custom_op!(CustomOp3, 3, [s1 l1 a, s2 l2 b, s3 l3 c], (Option<Tensor>, Option<Tensor>, Option<Tensor>));

/// Applies a differentiable kernel of one input.
pub(super) fn apply1<K: Differentiable<1>>(kernel: K, a: &Tensor) -> Result<Tensor> {
    apply(kernel, [a], |t, kernel| t[0].apply_op1(kernel))
}

/// Applies a differentiable kernel of two inputs.
pub(super) fn apply2<K: Differentiable<2>>(kernel: K, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    apply(kernel, [a, b], |t, kernel| t[0].apply_op2(&t[1], kernel))
}

/// Applies a differentiable kernel of three inputs.
pub(super) fn apply3<K: Differentiable<3>>(kernel: K, a: &Tensor, b: &Tensor, c: &Tensor) -> Result<Tensor> {
    apply(kernel, [a, b, c], |t, kernel| t[0].apply_op3(&t[1], &t[2], kernel))
}

/// Applies a kernel: outside any graph where no input is tracked, else on the tape that runs, or by candle where none does.
fn apply<const N: usize, K: Differentiable<N>>(
    kernel: K,
    inputs: [&Tensor; N],
    by_candle: impl FnOnce(&[Tensor], Recorded<K>) -> Result<Tensor>,
) -> Result<Tensor> {
    widened(&inputs, |t| {
        let inputs = std::array::from_fn(|i| &t[i]);
        if !t.iter().any(Tensor::track_op) {
            return value(&kernel, inputs, false);
        }
        if !tape::is_running() {
            return by_candle(t, Recorded(kernel));
        }
        let result = value(&kernel, inputs, true)?;
        let (kept, own) = (inputs.map(Tensor::clone), result.clone());
        tape::note(&inputs, &[&result], move |given| match &given[0] {
            Some(dy) => Ok(gradients(&kernel, std::array::from_fn(|i| &kept[i]), &own, dy)?.into()),
            None => Ok(Vec::new()),
        });
        Ok(result)
    })
}

/// Contiguous inputs of one type; on the CPU bf16 ones in f32, and the result back in bf16: the GPU's kernels do that
/// inside.
fn widened(inputs: &[&Tensor], f: impl FnOnce(&[Tensor]) -> Result<Tensor>) -> Result<Tensor> {
    let dtype = inputs[0].dtype();
    let out = f(&inputs.iter().map(|t| operand(t, dtype)).collect::<Result<Vec<_>>>()?)?;
    if dtype == DType::BF16 { out.to_dtype(dtype) } else { Ok(out) }
}

/// A tensor as a kernel takes it beside inputs of type `dtype`.
pub(super) fn operand(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if tensor.device().is_cuda() {
        return tensor.to_dtype(dtype)?.contiguous();
    }
    let tensor = tensor.contiguous()?;
    if dtype == DType::BF16 { tensor.to_dtype(DType::F32) } else { Ok(tensor) }
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
