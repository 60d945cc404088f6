//! `kernels/norm.cu`.

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
    let arguments = [x.into(), weight.into(), (&out).into(), x.rows().into(), x.width().into(), eps.into()];
    each_row(gpu, &format!("rms_norm_{}", suffix(x.dtype, "rms_norm")?), x.rows(), &arguments)?;
    Ok(memory)
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
    let (memory, dx) = allocate(gpu, x.dtype, &x.shape)?;
    let (_statistics, statistics) = allocate(gpu, DType::F32, &[x.rows(), 2])?;
    let mut arguments = vec![x.into(), weight.into(), dy.into(), (&dx).into(), (&statistics).into()];
    arguments.extend([x.rows(), x.width()].map(Argument::from));
    arguments.push(eps.into());
    each_row(gpu, &format!("rms_norm_backward_{}", suffix(x.dtype, "rms_norm")?), x.rows(), &arguments)?;
    let dweight = dweight.then(|| sum_rows(gpu, Summand::Normalised(x, dy, &statistics), 1)).transpose()?;
    Ok((memory, dweight))
}
