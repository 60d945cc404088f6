//! Group norms on a GPU; frozen, as on the CPU.

use super::{Input, on_storage};
use crate::cuda::{self, picture};
use crate::ops::kernel::refuse_tracked;
use candle_core::{DType, Result, Tensor, bail};

/// [`crate::ops::group_norm`].
pub(in crate::ops) fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    refuse_tracked("group_norm", &[x, weight, bias])?;
    let (x, dtype) = (x.contiguous()?, x.dtype());
    if !matches!(dtype, DType::F32 | DType::BF16) {
        bail!("group_norm: the GPU computes in f32 or bf16, not {dtype:?}");
    }
    let [weight, bias] = [weight, bias].map(|t| t.to_dtype(dtype)?.contiguous());
    on_storage(&[&x, &weight?, &bias?], |parts| {
        let [array, weight, bias] = [0, 1, 2].map(|i| Input::new(parts[i]).map(|input| input.array));
        let memory = picture::group_norm(&parts[0].0.device, &array?, (&weight?, &bias?), groups, eps as f32, silu)?;
        Ok(cuda::tensor(memory, x.shape()))
    })
}
