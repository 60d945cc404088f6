//! Norms of two streams that write where the streams are read as one.

use super::shape::{fits, tensor};
use super::{Input, made, on_storage};
use crate::cuda::{self, Array, norm};
use crate::ops::tape;
use candle_core::{Result, Tensor};

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
