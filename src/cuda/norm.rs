//! `kernels/norm.cu`.

use super::elementwise::{Span, copy_parts};
use super::gpu::{Argument, Array, Gpu, Launch, allocate, ceil, suffix};
use super::reduce::{Summand, sum_rows};
use candle_core::{DType, Result, bail};

/// Rows of a block, a warp each.
const ROWS: usize = 8;

fn each_row<G: Gpu>(gpu: &G, kernel: &str, rows: usize, arguments: &[Argument]) -> Result<()> {
    gpu.launch(&Launch {
        file: "norm",
        kernel,
        grid: [ceil(rows, ROWS), 1, 1],
        threads: [32 * ROWS, 1, 1],
        shared: 0,
        arguments,
    })
}

/// `LayerNorm(x) (1 + scale) + shift` with x `[B, .., D]`, shift and scale `[B, D]`.
pub fn layer_norm_modulate<G: Gpu>(gpu: &G, x: &Array, shift: &Array, scale: &Array, eps: f32) -> Result<G::Memory> {
    for other in [shift, scale] {
        if other.shape != [x.samples(), x.width()] {
            bail!("layer_norm_modulate: {:?} does not fit {:?}", other.shape, x.shape);
        }
    }
    let (memory, out) = allocate(gpu, x.dtype, &x.shape)?;
    let (rows, tokens) = (x.rows(), x.rows() / x.samples().max(1));
    let mut arguments = vec![x.into(), shift.into(), scale.into(), (&out).into()];
    arguments.extend([rows, tokens, x.width()].map(Argument::from));
    arguments.push(eps.into());
    let kernel = format!("layer_norm_modulate_{}", suffix(x.dtype, "layer_norm_modulate")?);
    each_row(gpu, &kernel, rows, &arguments)?;
    Ok(memory)
}

/// Gradients of x, and of shift and scale where `modulation` wants them.
pub fn layer_norm_modulate_backward<G: Gpu>(
    gpu: &G,
    x: &Array,
    scale: &Array,
    dy: &Array,
    eps: f32,
    modulation: bool,
) -> Result<[Option<G::Memory>; 3]> {
    let (memory, dx) = allocate(gpu, x.dtype, &x.shape)?;
    let (rows, tokens) = (x.rows(), x.rows() / x.samples().max(1));
    let (_statistics, statistics) = allocate(gpu, DType::F32, &[rows, 2])?;
    let mut arguments = vec![x.into(), scale.into(), dy.into(), (&dx).into(), (&statistics).into()];
    arguments.extend([rows, tokens, x.width()].map(Argument::from));
    arguments.push(eps.into());
    let kernel = format!("layer_norm_modulate_backward_{}", suffix(x.dtype, "layer_norm_modulate")?);
    each_row(gpu, &kernel, rows, &arguments)?;
    if !modulation {
        return Ok([Some(memory), None, None]);
    }
    let dshift = sum_rows(gpu, Summand::Plain(dy), x.samples())?;
    let dscale = sum_rows(gpu, Summand::Normalised(x, dy, &statistics), x.samples())?;
    Ok([Some(memory), Some(dshift), Some(dscale)])
}

/// `x / sqrt(mean(x^2) + eps) weight` over the last dimension.
pub fn rms_norm<G: Gpu>(gpu: &G, x: &Array, weight: &Array, eps: f32) -> Result<G::Memory> {
    if weight.len() != x.width() {
        bail!("rms_norm: weight {:?} does not fit {:?}", weight.shape, x.shape);
    }
    let (memory, out) = allocate(gpu, x.dtype, &x.shape)?;
    if is_head(&[x, weight, &out]) {
        rms_norm_into(gpu, x, weight, (&out, 0), eps)?;
        return Ok(memory);
    }
    let arguments = [x.into(), weight.into(), (&out).into(), x.rows().into(), x.width().into(), eps.into()];
    each_row(gpu, &format!("rms_norm_{}", suffix(x.dtype, "rms_norm")?), x.rows(), &arguments)?;
    Ok(memory)
}

/// Features of the heads that have kernels of their own.
const HEAD: usize = 64;

/// Whether arrays, the weight second, are of such heads and begin where these kernels want them.
pub fn is_head(arrays: &[&Array]) -> bool {
    let fits = |array: &&Array| array.pointer.is_multiple_of(16) && array.width() == HEAD;
    arrays.iter().all(fits) && arrays[1].len() == HEAD
}

/// [`rms_norm`] of heads `[B, T, H, 64]` into out `[B, all, H, 64]`, from a sample's token `first` on.
pub fn rms_norm_into<G: Gpu>(
    gpu: &G,
    x: &Array,
    weight: &Array,
    (out, first): (&Array, usize),
    eps: f32,
) -> Result<()> {
    let arguments = [x.into(), weight.into(), out.into()];
    on_heads(gpu, "rms_norm_head", x, (out, first), arguments.to_vec(), eps)
}

/// A kernel on the heads x, which are, or come from, a part of `other`.
fn on_heads<G: Gpu>(
    gpu: &G,
    kernel: &str,
    x: &Array,
    (other, first): (&Array, usize),
    mut arguments: Vec<Argument>,
    eps: f32,
) -> Result<()> {
    const THREADS: usize = 256;
    let rows = |array: &Array| array.rows() / array.samples().max(1);
    let heads = if x.shape.len() == 4 { x.shape[2] } else { 1 };
    let lanes = HEAD * x.dtype.size_in_bytes() / 16;
    arguments.extend([x.rows(), rows(x), rows(other), first * heads].map(Argument::from));
    arguments.push(eps.into());
    gpu.launch(&Launch {
        file: "norm",
        kernel: &format!("{kernel}_{}", suffix(x.dtype, kernel)?),
        grid: [ceil(x.rows() * lanes, THREADS), 1, 1],
        threads: [THREADS, 1, 1],
        shared: 0,
        arguments: &arguments,
    })
}

/// Gradients of x and, if it is wanted, weight.
pub fn rms_norm_backward<G: Gpu>(
    gpu: &G,
    x: &Array,
    weight: &Array,
    dy: &Array,
    eps: f32,
    dweight: bool,
) -> Result<(G::Memory, Option<G::Memory>)> {
    if is_head(&[x, weight, dy]) {
        return rms_norm_backward_from(gpu, x, weight, (dy, 0), eps, dweight);
    }
    let (memory, dx) = allocate(gpu, x.dtype, &x.shape)?;
    let (_statistics, statistics) = allocate(gpu, DType::F32, &[x.rows(), 2])?;
    let mut arguments = vec![x.into(), weight.into(), dy.into(), (&dx).into(), (&statistics).into()];
    arguments.extend([x.rows(), x.width()].map(Argument::from));
    arguments.push(eps.into());
    each_row(gpu, &format!("rms_norm_backward_{}", suffix(x.dtype, "rms_norm")?), x.rows(), &arguments)?;
    let dweight = dweight.then(|| sum_rows(gpu, Summand::Normalised(x, dy, &statistics), 1)).transpose()?;
    Ok((memory, dweight))
}

/// The same for heads, whose dy begins at a sample's token `first` of a longer sequence, `[B, all, H, 64]`.
pub fn rms_norm_backward_from<G: Gpu>(
    gpu: &G,
    x: &Array,
    weight: &Array,
    (dy, first): (&Array, usize),
    eps: f32,
    dweight: bool,
) -> Result<(G::Memory, Option<G::Memory>)> {
    let (memory, dx) = allocate(gpu, x.dtype, &x.shape)?;
    let (_statistics, statistics) = allocate(gpu, DType::F32, &[if dweight { x.rows() } else { 0 }, 2])?;
    let wanted = if dweight { (&statistics).into() } else { Argument::Pointer(0) };
    let arguments = vec![x.into(), weight.into(), dy.into(), (&dx).into(), wanted];
    on_heads(gpu, "rms_norm_head_backward", x, (dy, first), arguments, eps)?;
    if !dweight {
        return Ok((memory, None));
    }
    // The sum wants dy in the order of x.
    let (_own, own) = allocate(gpu, dy.dtype, &x.shape)?;
    let bytes = |array: &Array| array.len() / array.samples().max(1) * array.dtype.size_in_bytes();
    let start = first * bytes(x) / x.shape.get(1).copied().unwrap_or(1).max(1);
    let from = Span { start, length: bytes(x), all: bytes(dy) };
    copy_parts(gpu, x.samples(), (dy, from), (&own, Span { start: 0, length: bytes(x), all: bytes(x) }))?;
    Ok((memory, Some(sum_rows(gpu, Summand::Normalised(x, &own, &statistics), 1)?)))
}
