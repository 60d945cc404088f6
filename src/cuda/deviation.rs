//! `kernels/deviation.cu`.

use super::gpu::{Argument, Array, Gpu, Launch, allocate, ceil};
use super::reduce::join_sums;
use candle_core::{DType, Result, bail};

const FILE: &str = "deviation";
const THREADS: usize = 256;
/// Elements of a sample that a block sums, and blocks of a sample at most in the backward pass.
const PIECE: usize = 4096;
const MOST_BLOCKS: usize = 64;

/// n, links and count of v `[B, ..]`, others `[B, links, ..]` and factors `[B, count, links]`, which have been compared, as arguments.
fn sizes(v: &Array, others: &Array, factors: &Array) -> Result<[usize; 3]> {
    if [v.dtype, others.dtype, factors.dtype] != [DType::F32; 3] {
        bail!("deviations: the GPU computes them in f32");
    }
    match factors.shape[..] {
        [samples, count, links] => Ok([v.len() / samples.max(1), links, count]),
        _ => bail!("deviations: factors are {:?}", factors.shape),
    }
}

/// Sums of squares and of magnitudes, `[B, count, 2]`: see [`crate::ops::deviations`].
pub fn sums<G: Gpu>(gpu: &G, v: &Array, others: &Array, factors: &Array) -> Result<G::Memory> {
    let [n, links, count] = sizes(v, others, factors)?;
    let (samples, pieces) = (factors.samples(), ceil(n, PIECE));
    let (_partial, partial) = allocate(gpu, DType::F32, &[samples, pieces, 2 * count])?;
    let mut arguments = vec![v.into(), others.into(), factors.into(), (&partial).into()];
    arguments.extend([n, links, count, PIECE].map(Argument::from));
    let (grid, threads) = ([pieces, samples, 1], [THREADS, 1, 1]);
    gpu.launch(&Launch { file: FILE, kernel: "deviation_sums", grid, threads, shared: 0, arguments: &arguments })?;
    join_sums(gpu, &partial, DType::F32)
}

/// The gradient of v, given those of the sums, d `[B, count, 2]`.
pub fn backward<G: Gpu>(gpu: &G, v: &Array, others: &Array, factors: &Array, d: &Array) -> Result<G::Memory> {
    let [n, links, count] = sizes(v, others, factors)?;
    let (memory, dv) = allocate(gpu, DType::F32, &v.shape)?;
    let mut arguments = vec![v.into(), others.into(), factors.into(), d.into(), (&dv).into()];
    arguments.extend([n, links, count].map(Argument::from));
    let grid = [ceil(n, THREADS).min(MOST_BLOCKS), factors.samples(), 1];
    let threads = [THREADS, 1, 1];
    gpu.launch(&Launch { file: FILE, kernel: "deviation_backward", grid, threads, shared: 0, arguments: &arguments })?;
    Ok(memory)
}
