//! Streams of tokens joined and parted on a GPU: copies of whole packs.

use super::{Input, made, on_storage};
use crate::cuda::elementwise::{Span, copy_parts};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Result, Storage, Tensor};

/// A result: outside any graph, or as a leaf of candle's.
pub(super) fn tensor(storage: CudaStorage, shape: Vec<usize>, is_leaf: bool) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), is_leaf)
}

/// Bytes of so many tokens of a sample of x `[B, T, ..]`.
fn bytes(x: &Tensor, tokens: usize) -> usize {
    x.dims()[2..].iter().product::<usize>() * tokens * x.dtype().size_in_bytes()
}

/// Whether tokens are whole packs of 16 bytes, in tensors of a GPU that are of one type and lie in order.
pub(super) fn fits(tensors: &[&Tensor]) -> bool {
    let whole = |x: &Tensor| x.rank() > 2 && bytes(x, 1).is_multiple_of(16) && x.layout().start_offset() == 0;
    tensors.iter().all(|x| x.device().is_cuda() && x.is_contiguous() && whole(x) && x.dtype() == tensors[0].dtype())
}

/// The tokens of both.
pub(in crate::ops) fn joined(first: &Tensor, second: &Tensor, is_leaf: bool) -> Result<Option<Tensor>> {
    if !fits(&[first, second]) || first.dims()[2..] != second.dims()[2..] {
        return Ok(None);
    }
    let (at, rest, samples) = (first.dim(1)?, second.dim(1)?, first.dim(0)?);
    let mut shape = first.dims().to_vec();
    shape[1] = at + rest;
    on_storage(&[first, second], |parts| {
        let (first_array, second_array) = (Input::new(parts[0])?.array, Input::new(parts[1])?.array);
        let (memory, out) = made(&parts[0].0.device, first.dtype(), &shape)?;
        let [head, tail] = [bytes(first, at), bytes(first, rest)];
        for (array, start, length) in [(&first_array, 0, head), (&second_array, head, tail)] {
            let own = Span { start: 0, length, all: length };
            copy_parts(&parts[0].0.device, samples, (array, own), (&out, Span { start, all: head + tail, ..own }))?;
        }
        Ok(Some(tensor(memory, shape.clone(), is_leaf)))
    })
}

/// Tokens `start..start + len` of x.
pub(in crate::ops) fn part(x: &Tensor, start: usize, len: usize, is_leaf: bool) -> Result<Option<Tensor>> {
    if !fits(&[x]) {
        return Ok(None);
    }
    let mut shape = x.dims().to_vec();
    let (samples, all) = (shape[0], bytes(x, shape[1]));
    shape[1] = len;
    on_storage(&[x], |parts| {
        let gpu = &parts[0].0.device;
        let (memory, out) = made(gpu, x.dtype(), &shape)?;
        let own = Span { start: 0, length: bytes(x, len), all: bytes(x, len) };
        let from = Span { start: bytes(x, start), all, ..own };
        copy_parts(gpu, samples, (&Input::new(parts[0])?.array, from), (&out, own))?;
        Ok(Some(tensor(memory, shape.clone(), is_leaf)))
    })
}
