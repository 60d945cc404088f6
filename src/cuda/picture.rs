//! `kernels/picture.cu`: pictures `[B, H, W, C]`.

use super::gpu::{Argument, Array, Gpu, Launch, allocate, ceil, suffix};
use candle_core::{DType, Result, bail};

const FILE: &str = "picture";
const THREADS: usize = 256;
const MOST_BLOCKS: usize = 1 << 16;
/// Pixels whose statistics one block takes.
const PIECE: usize = 128;
/// Bytes that are read at once.
const PACK: usize = 16;

/// Packs of so many elements of a row, if it is whole packs in arrays that begin where they have to.
fn packs(arrays: &[&Array], channels: usize) -> Result<usize> {
    let bytes = channels * arrays[0].dtype.size_in_bytes();
    if !bytes.is_multiple_of(PACK) || arrays.iter().any(|array| !array.pointer.is_multiple_of(PACK as u64)) {
        bail!("pictures of {channels} channels, {bytes} bytes a pixel: the GPU's kernels take multiples of {PACK}");
    }
    Ok(bytes / PACK)
}

/// Which neighbours are gathered.
#[derive(Debug, Clone, Copy)]
pub struct Neighbours {
    /// Picture of the batch.
    pub sample: usize,
    /// Side of the kernel.
    pub size: usize,
    /// 0: over every pixel; 1: over every second; 2: over every pixel of the doubled picture.
    pub walk: i32,
    /// Width of the result.
    pub out_width: usize,
    /// First pixel of the result.
    pub first: usize,
    /// Pixels of the result.
    pub count: usize,
}

/// Writes the neighbours `[count, size, size, C]` of some pixels of x `[B, H, W, C]`.
pub fn gather<G: Gpu>(gpu: &G, x: &Array, out: &Array, of: Neighbours) -> Result<()> {
    let &[_, height, width, channels] = &x.shape[..] else { bail!("gather: {:?} is not [B, H, W, C]", x.shape) };
    let packs = packs(&[x, out], channels)?;
    if out.len() < of.count * of.size * of.size * channels || out.dtype != x.dtype {
        bail!("gather: {of:?} of {x:?} do not fit {out:?}");
    }
    let picture = x.pointer + (of.sample * height * width * packs * PACK) as u64;
    let mut arguments = vec![Argument::Pointer(picture), out.into()];
    arguments.extend([of.count, of.first, packs].map(Argument::from));
    arguments.extend([height, width, of.out_width, of.size].map(|n| Argument::Int(n as i32)));
    arguments.push(Argument::Int(of.walk));
    let n = of.count * of.size * of.size * packs;
    let (grid, threads) = ([ceil(n, THREADS).min(MOST_BLOCKS), 1, 1], [THREADS, 1, 1]);
    gpu.launch(&Launch { file: FILE, kernel: "gather", grid, threads, shared: 0, arguments: &arguments })
}

/// Group norm of x `[B, .., C]` by weight and bias `[C]`, with SiLU after it if wanted; sums in f32.
pub fn group_norm<G: Gpu>(
    gpu: &G,
    x: &Array,
    (weight, bias): (&Array, &Array),
    groups: usize,
    eps: f32,
    silu: bool,
) -> Result<G::Memory> {
    let (samples, channels) = (x.samples(), x.width());
    let fits = [weight, bias].iter().all(|a| a.len() == channels && a.dtype == x.dtype);
    if !fits || groups == 0 || !channels.is_multiple_of(groups) {
        bail!("group_norm: {:?}, {:?} and {groups} groups do not fit {:?}", weight.shape, bias.shape, x.shape);
    }
    let (memory, out) = allocate(gpu, x.dtype, &x.shape)?;
    let packs = packs(&[x, &out], channels)?;
    let pixels = x.rows() / samples.max(1);
    let pieces = ceil(pixels, PIECE);
    let (_partial, partial) = allocate(gpu, DType::F32, &[samples, pieces, channels, 2])?;
    let (_affine, affine) = allocate(gpu, DType::F32, &[samples, channels, 2])?;
    let run = |name: &str, grid: [usize; 3], arguments: &[Argument]| {
        let kernel = format!("{name}_{}", suffix(x.dtype, name)?);
        gpu.launch(&Launch { file: FILE, kernel: &kernel, grid, threads: [THREADS, 1, 1], shared: 0, arguments })
    };
    let sizes = [pixels, channels, PIECE].map(Argument::from);
    run("channel_sums", [pieces, samples, 1], &[[x, &partial].map(Argument::from).as_slice(), &sizes].concat())?;
    let mut arguments = [&partial, weight, bias, &affine].map(Argument::from).to_vec();
    arguments.extend([pixels, channels, pieces, PIECE].map(Argument::from));
    arguments.push(eps.into());
    run("group_affine", [groups, samples, 1], &arguments)?;
    let n = x.rows() * packs;
    let mut arguments = [x, &affine, &out].map(Argument::from).to_vec();
    arguments.extend([n, pixels * packs, packs].map(Argument::from));
    arguments.push(i32::from(silu).into());
    run("apply_affine", [ceil(n, THREADS).min(MOST_BLOCKS), 1, 1], &arguments)?;
    Ok(memory)
}
