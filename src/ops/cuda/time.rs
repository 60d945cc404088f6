//! The time as sines and cosines on a GPU.

use super::{Input, on_storage};
use crate::cuda::{self, elementwise};
use candle_core::{DType, Result, Tensor};

/// `[B]` to `[B, 2 half]`: see [`crate::ops::time_features`].
pub(in crate::ops) fn time_features(t: &Tensor, half: usize) -> Result<Tensor> {
    let t = t.detach().to_dtype(DType::F32)?.contiguous()?;
    on_storage(&[&t], |parts| {
        let input = Input::new(parts[0])?;
        let features = elementwise::time_features(&input.storage.device, &input.array, half)?;
        Ok(cuda::tensor(features, (t.dim(0)?, 2 * half)))
    })
}
