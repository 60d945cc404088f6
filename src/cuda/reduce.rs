//! `kernels/reduce.cu`: sums in an order that depends on the sizes only.

use super::gpu::{Argument, Array, Gpu, Launch, allocate, ceil, suffix};
use candle_core::{DType, Result, bail};

const FILE: &str = "reduce";
/// Threads of a row of a block, at most, and rows that it reads at once.
const MOST_THREADS: usize = 32;
const LANES: usize = 8;
/// Bytes that a thread reads at once, where rows and arrays are made of such.
const PACK: usize = 16;
/// Rows that are summed at once, at least, and into how many sums a sample is cut, at most.
const PIECE: usize = 128;
const MOST_PIECES: usize = 512;
const THREADS: usize = 256;

/// What is summed: matrices `[.., width]`.
#[derive(Debug, Clone, Copy)]
pub enum Summand<'a> {
    /// a.
    Plain(&'a Array),
    /// a b.
    Product(&'a Array, &'a Array),
    /// b times the normalised a, whose rows have the mean and reciprocal deviation given, `[rows, 2]`.
    Normalised(&'a Array, &'a Array, &'a Array),
}

/// Sums over the rows of each of `samples` equal parts: `[samples, width]`, of the type of the summands.
pub fn sum_rows<G: Gpu>(gpu: &G, summand: Summand, samples: usize) -> Result<G::Memory> {
    let (kernel, a, b, mut arguments) = match summand {
        Summand::Plain(a) => ("sum_plain", a, a, vec![a.into()]),
        Summand::Product(a, b) => ("sum_product", a, b, vec![a.into(), b.into()]),
        Summand::Normalised(a, b, statistics) => ("sum_normalised", a, b, vec![a.into(), b.into(), statistics.into()]),
    };
    let (suffix, width, rows) = (suffix(a.dtype, kernel)?, a.width(), a.rows() / samples.max(1));
    let row = width * a.dtype.size_in_bytes();
    let in_packs = [row, a.pointer as usize, b.pointer as usize].iter().all(|n| n.is_multiple_of(PACK));
    let (kind, across) = if in_packs { ("packs_", row / PACK) } else { ("", width) };
    let threads = across.clamp(1, MOST_THREADS);
    let piece = ceil(rows, MOST_PIECES).max(PIECE);
    let pieces = ceil(rows, piece);
    let (_partial, partial) = allocate(gpu, DType::F32, &[samples, pieces, width])?;
    arguments.push((&partial).into());
    arguments.extend([rows, width, piece].map(Argument::from));
    gpu.launch(&Launch {
        file: FILE,
        kernel: &format!("{kernel}_{kind}{suffix}"),
        grid: [ceil(across, threads), pieces, samples],
        threads: [threads, LANES, 1],
        shared: 0,
        arguments: &arguments,
    })?;
    join_sums(gpu, &partial, a.dtype)
}

/// The sums `[samples, width]` of the pieces' sums `[samples, pieces, width]`.
pub(super) fn join_sums<G: Gpu>(gpu: &G, partial: &Array, dtype: DType) -> Result<G::Memory> {
    let &[samples, pieces, width] = &partial.shape[..] else { bail!("join_sums: {partial:?} are no sums of pieces") };
    let (memory, out) = allocate(gpu, dtype, &[samples, width])?;
    gpu.launch(&Launch {
        file: FILE,
        kernel: &format!("join_sums_{}", suffix(dtype, "join_sums")?),
        grid: [ceil(samples * width, THREADS), 1, 1],
        threads: [THREADS, 1, 1],
        shared: 0,
        arguments: &[partial.into(), (&out).into(), out.len().into(), pieces.into(), width.into()],
    })?;
    Ok(memory)
}

/// Elements that a block squares and sums.
const SQUARES: usize = 1 << 16;

/// Sums of squares in f64 of pieces of an f32 array, `[pieces]`.
pub fn square_sums<G: Gpu>(gpu: &G, x: &Array) -> Result<(G::Memory, usize)> {
    if x.dtype != DType::F32 {
        bail!("square_sums: {} instead of f32", x.dtype.as_str());
    }
    let pieces = ceil(x.len(), SQUARES);
    let (memory, partial) = allocate(gpu, DType::F64, &[pieces])?;
    gpu.launch(&Launch {
        file: FILE,
        kernel: "square_sum",
        grid: [pieces, 1, 1],
        threads: [THREADS, 1, 1],
        shared: 0,
        arguments: &[x.into(), (&partial).into(), x.len().into(), SQUARES.into()],
    })?;
    Ok((memory, pieces))
}
