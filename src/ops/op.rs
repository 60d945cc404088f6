//! The bridge between our kernels and candle's graph.

use super::kernel::{Kernel, on_cpu, run_as};
use super::tape;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor};

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
