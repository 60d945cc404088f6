//! Other views of tokens: what candle does as well, but whose gradients it forms by way of zeros.

use super::tape;
use candle_core::{Result, Shape, Tensor, Var};

/// x in another shape of as many elements.
pub fn reshape(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let y = x.reshape(shape.into())?;
    let before = x.shape().clone();
    if x.track_op() && y.id() != x.id() {
        tape::note(&[x], &[&y], move |given| Ok(vec![given[0].as_ref().map(|d| d.reshape(&before)).transpose()?]));
    }
    Ok(y)
}

/// x `[B, n D]` in n pieces `[B, D]`, each in one piece of memory, by one copy of all.
pub fn chunk(x: &Tensor, n: usize) -> Result<Vec<Tensor>> {
    let (batch, width) = x.dims2()?;
    let all = x.reshape((batch, n, width / n))?.transpose(0, 1)?.contiguous()?;
    let pieces = (0..n).map(|i| all.get(i)).collect::<Result<Vec<_>>>()?;
    if x.track_op() {
        tape::note(&[x], &pieces.iter().collect::<Vec<_>>(), move |given| {
            let Some(one) = given.iter().flatten().next() else { return Ok(Vec::new()) };
            let all: Vec<_> =
                given.iter().map(|d| d.clone().map_or_else(|| one.zeros_like(), Ok)).collect::<Result<_>>()?;
            Ok(vec![Some(Tensor::stack(&all, 1)?.reshape((batch, width))?)])
        });
    }
    Ok(pieces)
}

/// Tokens of two streams, `[B, T, ..]` and `[B, L, ..]`, as those of one, `[B, T + L, ..]`.
pub fn join(first: &Tensor, second: &Tensor) -> Result<Tensor> {
    let (at, rest) = (first.dim(1)?, second.dim(1)?);
    let wanted = [first.track_op(), second.track_op()];
    if wanted == [false, false] {
        return joined(first, second, false);
    }
    let result = if tape::is_running() { joined(first, second, true)? } else { Tensor::cat(&[first, second], 1)? };
    tape::note(&[first, second], &[&result], move |given| {
        let Some(d) = &given[0] else { return Ok(Vec::new()) };
        let of = |i: usize, start, len| wanted[i].then(|| part(d, start, len, false)).transpose();
        Ok(vec![of(0, 0, at)?, of(1, at, rest)?])
    });
    Ok(result)
}

/// The first `at` tokens of x `[B, T, ..]` and the others: the inverse of [`join`].
pub fn split(x: &Tensor, at: usize) -> Result<(Tensor, Tensor)> {
    let rest = x.dim(1)? - at;
    if x.track_op() && !tape::is_running() {
        return Ok((x.narrow(1, 0, at)?.contiguous()?, x.narrow(1, at, rest)?.contiguous()?));
    }
    let (first, second) = (part(x, 0, at, x.track_op())?, part(x, at, rest, x.track_op())?);
    if x.track_op() {
        let shapes = [first.shape().clone(), second.shape().clone()];
        tape::note(&[x], &[&first, &second], move |given| {
            let of = |i: usize| match (&given[i], &given[1 - i]) {
                (Some(d), _) => Ok(d.clone()),
                (None, Some(other)) => Tensor::zeros(&shapes[i], other.dtype(), other.device()),
                (None, None) => candle_core::bail!("split: no part has a gradient"),
            };
            Ok(vec![Some(joined(&of(0)?, &of(1)?, false)?)])
        });
    }
    Ok((first, second))
}

/// The value of [`join`]: outside any graph, or as a leaf of candle's.
fn joined(first: &Tensor, second: &Tensor, is_leaf: bool) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(joined) = super::cuda::joined(first, second, is_leaf)? {
        return Ok(joined);
    }
    leaf(Tensor::cat(&[&first.detach(), &second.detach()], 1)?, is_leaf)
}

/// Tokens `start..start + len` of x `[B, T, ..]`: outside any graph, or as a leaf of candle's.
fn part(x: &Tensor, start: usize, len: usize, is_leaf: bool) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(part) = super::cuda::part(x, start, len, is_leaf)? {
        return Ok(part);
    }
    leaf(x.detach().narrow(1, start, len)?.contiguous()?, is_leaf)
}

/// The same values, as a leaf of candle's graph if that is wanted.
fn leaf(x: Tensor, is_leaf: bool) -> Result<Tensor> {
    if is_leaf { Ok(Var::from_tensor(&x)?.into_inner()) } else { Ok(x) }
}
