//! Streams of tokens joined and parted on a GPU: copies of whole packs, and norms that write where they are read.

use super::{Input, made, on_storage};
use crate::cuda::elementwise::{self, Span, copy_parts};
use crate::cuda::{self, Array, norm};
use crate::ops::tape;
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Result, Storage, Tensor};

fn tensor(storage: CudaStorage, shape: Vec<usize>, is_leaf: bool) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), is_leaf)
}

/// a + b, of one type and shape: candle's takes three times as long.
pub(in crate::ops) fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    on_storage(&[&a, &b], |parts| {
        let (left, right) = (Input::new(parts[0])?.array, Input::new(parts[1])?.array);
        Ok(cuda::tensor(elementwise::add(&parts[0].0.device, &left, &right)?, a.shape()))
    })
}

/// Bytes of so many tokens of a sample of x `[B, T, ..]`.
fn bytes(x: &Tensor, tokens: usize) -> usize {
    x.dims()[2..].iter().product::<usize>() * tokens * x.dtype().size_in_bytes()
}

/// Whether tokens are whole packs of 16 bytes, in tensors of a GPU that are of one type and lie in order.
fn fits(tensors: &[&Tensor]) -> bool {
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

/// Two streams' heads `[B, T, H, 64]`, normalised and joined; nothing where candle has to record it, or for other heads.
pub(in crate::ops) fn rms_norm_joined(streams: [(&Tensor, &Tensor); 2], eps: f64) -> Result<Option<Tensor>> {
    let [(first, first_weight), (second, second_weight)] = streams;
    let all = [first, first_weight, second, second_weight];
    let is_tracked = all.iter().any(|t| t.track_op());
    let same = first.dtype() == first_weight.dtype() && first.dtype() == second_weight.dtype();
    if !fits(&[first, second]) || !same || first.rank() != 4 || (is_tracked && !tape::is_running()) {
        return Ok(None);
    }
    let (at, rest) = (first.dim(1)?, second.dim(1)?);
    let mut shape = first.dims().to_vec();
    shape[1] = at + rest;
    let joined = on_storage(&all, |parts| {
        let arrays = parts.iter().map(|&part| Ok(Input::new(part)?.array)).collect::<Result<Vec<Array>>>()?;
        let [x, weight, other, other_weight] = &arrays[..] else { return Ok(None) };
        if !norm::is_head(&[x, weight]) || !norm::is_head(&[other, other_weight]) {
            return Ok(None);
        }
        let gpu = &parts[0].0.device;
        let (memory, out) = made(gpu, first.dtype(), &shape)?;
        norm::rms_norm_into(gpu, x, weight, (&out, 0), eps as f32)?;
        norm::rms_norm_into(gpu, other, other_weight, (&out, at), eps as f32)?;
        Ok(Some(tensor(memory, shape.clone(), is_tracked)))
    })?;
    let (Some(joined), true) = (&joined, is_tracked) else { return Ok(joined) };
    let kept = all.map(Tensor::clone);
    tape::note(&all, &[joined], move |given| {
        let Some(d) = &given[0] else { return Ok(Vec::new()) };
        let d = d.contiguous()?;
        let mut gradients = Vec::new();
        for (pair, start) in kept.chunks_exact(2).zip([0, at]) {
            let wanted = [pair[0].track_op(), pair[1].track_op()];
            let (dx, dweight) = on_storage(&[&pair[0], &pair[1], &d], |parts| {
                let [x, weight, d] = [parts[0], parts[1], parts[2]].map(Input::new);
                let (x, weight, d) = (x?.array, weight?.array, d?.array);
                norm::rms_norm_backward_from(&parts[0].0.device, &x, &weight, (&d, start), eps as f32, wanted[1])
            })?;
            gradients.push(wanted[0].then(|| cuda::tensor(dx, pair[0].shape())));
            gradients.push(dweight.map(|dweight| cuda::tensor(dweight, pair[1].shape())));
        }
        Ok(gradients)
    });
    Ok(Some(joined.clone()))
}
