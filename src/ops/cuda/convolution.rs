//! Convolutions on a GPU; frozen, as on the CPU.

use super::{Input, made, on_storage};
use crate::cuda::picture::{self, Neighbours};
use crate::cuda::product::{Matrix, Then, multiply};
use crate::cuda::{self, Array, ceil};
use crate::ops::Walk;
use crate::ops::kernel::refuse_tracked;
use candle_core::{Result, Tensor, bail};

/// Bytes of gathered neighbours at a time: what stays in the GPU's cache between the copy and the product.
const GATHERED: usize = 24 << 20;

/// Results have whole packs of 16 bytes a pixel.
const PACK: usize = 16;

/// [`crate::ops::convolution`]: the neighbours of some pixels side by side, times the weights.
pub(in crate::ops) fn convolution(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    walk: Walk,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    refuse_tracked("convolution", &[x, weight, bias, residual.unwrap_or(x)])?;
    let (batch, height, width, c_in) = x.dims4()?;
    let (size, columns, w_in, c_out) = weight.dims4()?;
    let shape = [batch, walk.result(height), walk.result(width), c_out];
    let residual_fits = residual.is_none_or(|r| r.dims() == shape);
    if w_in != c_in || size != columns || bias.dims() != [c_out] || !residual_fits {
        bail!("convolution: weight {weight:?}, bias {bias:?} or residual {residual:?} do not fit {x:?}");
    }
    let whole = PACK / x.dtype().size_in_bytes();
    let (x, weight) = (padded(x, 3, whole)?, padded(&padded(weight, 2, whole)?, 3, whole)?);
    let (bias, residual) = (padded(bias, 0, whole)?, residual.map(|r| padded(r, 3, whole)).transpose()?);
    let y = on_storage(&[&x, &weight, &bias, residual.as_ref().unwrap_or(&x)], |parts| {
        let arrays = parts.iter().map(|&part| Ok(Input::new(part)?.array)).collect::<Result<Vec<Array>>>()?;
        let [x, weight, bias, other] = &arrays[..] else { bail!("convolution: four tensors") };
        let gpu = &parts[0].0.device;
        let (c_in, c_out) = (x.width(), weight.width());
        let (pixels, row) = (shape[1] * shape[2], size * size * c_in);
        let (memory, y) = made(gpu, x.dtype, &[batch, shape[1], shape[2], c_out])?;
        let at_once = (GATHERED / (row * x.dtype.size_in_bytes())).clamp(1, pixels);
        let (_gathered, gathered) = made(gpu, x.dtype, &[at_once, row])?;
        for piece in 0..batch * ceil(pixels, at_once) {
            let (sample, first) = (piece / ceil(pixels, at_once), piece % ceil(pixels, at_once) * at_once);
            let count = at_once.min(pixels - first);
            let of = Neighbours { sample, size, walk: walk as i32, out_width: shape[2], first, count };
            let start = sample * pixels + first;
            let left = match size {
                1 => rows(x, start, count),
                _ => {
                    picture::gather(gpu, x, &gathered, of)?;
                    rows(&Array { shape: vec![at_once, row], ..gathered.clone() }, 0, count)
                }
            };
            let other = residual.is_some().then(|| rows(other, start, count));
            let then = other.as_ref().map_or(Then::Bias(bias), |other| Then::BiasOnto(bias, other));
            multiply(gpu, 1.0, Matrix::new(&left, row), Matrix::new(weight, c_out), &rows(&y, start, count), then)?;
        }
        Ok(cuda::tensor(memory, y.shape))
    })?;
    if y.dim(3)? == c_out { Ok(y) } else { y.narrow(3, 0, c_out)?.contiguous() }
}

/// With zeros at the end of a dimension, up to a multiple of `whole`.
fn padded(x: &Tensor, dim: usize, whole: usize) -> Result<Tensor> {
    let missing = x.dim(dim)?.next_multiple_of(whole) - x.dim(dim)?;
    if missing == 0 { x.contiguous() } else { x.pad_with_zeros(dim, 0, missing)?.contiguous() }
}

/// `count` rows of an array `[.., width]` from row `start` on.
fn rows(array: &Array, start: usize, count: usize) -> Array {
    let width = array.width();
    let bytes = start * width * array.dtype.size_in_bytes();
    Array { pointer: array.pointer + bytes as u64, dtype: array.dtype, shape: vec![count, width] }
}
