//! `kernels/elementwise.cu`.

use super::gpu::{Argument, Array, Gpu, Launch, allocate, ceil, suffix};
use super::reduce::{Summand, sum_rows};
use candle_core::{DType, Result, bail};

const FILE: &str = "elementwise";
const THREADS: usize = 256;

/// Elements of a thread, at least, and blocks at most.
const SHARE: usize = 4;
const MOST_BLOCKS: usize = 1 << 16;

/// A kernel over n elements.
fn each<G: Gpu>(gpu: &G, kernel: &str, n: usize, arguments: &[Argument]) -> Result<()> {
    let grid = [ceil(n, THREADS * SHARE).min(MOST_BLOCKS), 1, 1];
    gpu.launch(&Launch { file: FILE, kernel, grid, threads: [THREADS, 1, 1], shared: 0, arguments })
}

/// A kernel with a block a row.
fn each_row<G: Gpu>(gpu: &G, kernel: &str, rows: usize, arguments: &[Argument]) -> Result<()> {
    gpu.launch(&Launch { file: FILE, kernel, grid: [rows, 1, 1], threads: [THREADS, 1, 1], shared: 0, arguments })
}

/// `gelu` or `silu` of x.
pub fn activation<G: Gpu>(gpu: &G, name: &str, x: &Array) -> Result<G::Memory> {
    let (memory, y) = allocate(gpu, x.dtype, &x.shape)?;
    activate(gpu, name, x, &y)?;
    Ok(memory)
}

/// The same into y.
pub(super) fn activate<G: Gpu>(gpu: &G, name: &str, x: &Array, y: &Array) -> Result<()> {
    let kernel = format!("{name}_{}", suffix(x.dtype, name)?);
    each(gpu, &kernel, x.len(), &[x.into(), y.into(), x.len().into()])
}

/// The gradient of x, given that of the activation.
pub fn activation_backward<G: Gpu>(gpu: &G, name: &str, x: &Array, dy: &Array) -> Result<G::Memory> {
    let (memory, dx) = allocate(gpu, x.dtype, &x.shape)?;
    activate_backward(gpu, name, x, dy, &dx)?;
    Ok(memory)
}

/// The same into dx.
pub(super) fn activate_backward<G: Gpu>(gpu: &G, name: &str, x: &Array, dy: &Array, dx: &Array) -> Result<()> {
    let kernel = format!("{name}_backward_{}", suffix(x.dtype, name)?);
    each(gpu, &kernel, x.len(), &[x.into(), dy.into(), dx.into(), x.len().into()])
}

/// Adds a bias `[width]` to y `[.., width]`, in place.
pub fn add_bias<G: Gpu>(gpu: &G, y: &Array, bias: &Array) -> Result<()> {
    if bias.len() != y.width() {
        bail!("linear: bias {:?} does not fit {:?}", bias.shape, y.shape);
    }
    let kernel = format!("bias_{}", suffix(y.dtype, "linear")?);
    each_row(gpu, &kernel, y.rows(), &[y.into(), bias.into(), y.width().into()])
}

/// `x + gate y` with x and y `[B, .., D]`, gate `[B, D]`.
pub fn gated_residual<G: Gpu>(gpu: &G, x: &Array, gate: &Array, y: &Array) -> Result<G::Memory> {
    if x.shape != y.shape || gate.shape != [x.samples(), x.width()] {
        bail!("gated_residual: {:?}, gate {:?} and {:?} do not fit", x.shape, gate.shape, y.shape);
    }
    let (memory, out) = allocate(gpu, x.dtype, &x.shape)?;
    let kernel = format!("gated_residual_{}", suffix(x.dtype, "gated_residual")?);
    let tokens = x.rows() / x.samples().max(1);
    each_row(
        gpu,
        &kernel,
        x.rows(),
        &[x.into(), gate.into(), y.into(), (&out).into(), tokens.into(), x.width().into()],
    )?;
    Ok(memory)
}

/// Gradients of gate, if it is wanted, and y; that of x is `d` itself.
pub fn gated_residual_backward<G: Gpu>(
    gpu: &G,
    gate: &Array,
    y: &Array,
    d: &Array,
    dgate: bool,
) -> Result<(Option<G::Memory>, G::Memory)> {
    let (memory, dy) = allocate(gpu, y.dtype, &y.shape)?;
    let kernel = format!("gated_residual_backward_{}", suffix(y.dtype, "gated_residual")?);
    let tokens = y.rows() / y.samples().max(1);
    each_row(gpu, &kernel, y.rows(), &[gate.into(), d.into(), (&dy).into(), tokens.into(), y.width().into()])?;
    let dgate = dgate.then(|| sum_rows(gpu, Summand::Product(y, d), y.samples())).transpose()?;
    Ok((dgate, memory))
}

/// Adds to the f32 array what `source`, f32 or bf16, holds.
pub fn add_to<G: Gpu>(gpu: &G, destination: &Array, source: &Array) -> Result<()> {
    if destination.dtype != DType::F32 || destination.len() < source.len() {
        bail!("add_to: {source:?} does not fit into {destination:?}");
    }
    let kernel = format!("add_to_{}", suffix(source.dtype, "add_to")?);
    each(gpu, &kernel, source.len(), &[destination.into(), source.into(), source.len().into()])
}

/// `a + b`, of one shape.
pub fn add<G: Gpu>(gpu: &G, a: &Array, b: &Array) -> Result<G::Memory> {
    if a.shape != b.shape || a.dtype != b.dtype {
        bail!("add: {a:?} and {b:?} differ");
    }
    let (memory, out) = allocate(gpu, a.dtype, &a.shape)?;
    add_into(gpu, a, b, &out)?;
    Ok(memory)
}

/// The same into an array.
pub(super) fn add_into<G: Gpu>(gpu: &G, a: &Array, b: &Array, out: &Array) -> Result<()> {
    let kernel = format!("add_{}", suffix(a.dtype, "add")?);
    each(gpu, &kernel, a.len(), &[a.into(), b.into(), out.into(), a.len().into()])
}

/// `x [rows, width]`, f32, as `[rows, 3, width]` in bf16: the high halves of its numbers, and once more, and the low ones in
/// place `low`, 1 or 2.
pub fn bf16x3<G: Gpu>(gpu: &G, x: &Array, width: usize, low: usize) -> Result<G::Memory> {
    if x.dtype != DType::F32 {
        bail!("bf16x3: {x:?} is not f32");
    }
    let (memory, y) = allocate(gpu, DType::BF16, &[3 * x.len()])?;
    each(gpu, "bf16x3", x.len(), &[x.into(), (&y).into(), x.len().into(), width.into(), low.into()])?;
    Ok(memory)
}

/// The gradient of x, f32, given that of the result, bf16.
pub fn bf16x3_backward<G: Gpu>(gpu: &G, dy: &Array, width: usize, low: usize) -> Result<G::Memory> {
    if dy.dtype != DType::BF16 || !dy.len().is_multiple_of(3 * width.max(1)) {
        bail!("bf16x3: {dy:?} is no gradient of rows of {width}");
    }
    let n = dy.len() / 3;
    let (memory, dx) = allocate(gpu, DType::F32, &[n])?;
    each(gpu, "bf16x3_backward", n, &[dy.into(), (&dx).into(), n.into(), width.into(), low.into()])?;
    Ok(memory)
}

/// A part of each sample: `length` bytes from `start` on of `all`, of which each sample has so many.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// Bytes.
    pub length: usize,
    /// Bytes of a sample.
    pub all: usize,
}

/// Copies a part of each of `samples` samples to a part of another array's.
pub fn copy_parts<G: Gpu>(
    gpu: &G,
    samples: usize,
    (source, from): (&Array, Span),
    (destination, to): (&Array, Span),
) -> Result<()> {
    const PACK: usize = 16;
    let numbers = [from.start, from.length, from.all, to.start, to.length, to.all];
    let pointers = [source, destination].map(|array| array.pointer as usize);
    if from.length != to.length || numbers.iter().chain(&pointers).any(|n| !n.is_multiple_of(PACK)) {
        bail!("copy_parts: {from:?} of {source:?} and {to:?} of {destination:?} are not whole packs of {PACK} bytes");
    }
    let at = |array: &Array, span: Span| Argument::Pointer(array.pointer + span.start as u64);
    let n = samples * from.length / PACK;
    let mut arguments = vec![at(source, from), at(destination, to)];
    arguments.extend([n, from.length / PACK, from.all / PACK, to.all / PACK].map(Argument::from));
    each(gpu, "copy_rows", n, &arguments)
}

/// The numbers of an AdamW step (optim/adamw.rs).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwNumbers {
    /// Factor of the gradient.
    pub scale: f32,
    /// Of both moments.
    pub betas: (f32, f32),
    /// Factor of the parameters.
    pub decay: f32,
    /// Learning rate over the first moment's correction.
    pub rate: f32,
    /// Root of the second moment's correction.
    pub root: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

/// One AdamW step on a state `[3 n]` with a gradient `[n]`, in place.
pub fn adamw<G: Gpu>(gpu: &G, state: &Array, gradient: &Array, numbers: AdamwNumbers) -> Result<()> {
    if [state.dtype, gradient.dtype] != [DType::F32; 2] || state.len() != 3 * gradient.len() {
        bail!("adamw: {gradient:?} does not fit {state:?}");
    }
    let AdamwNumbers { scale, betas, decay, rate, root, eps } = numbers;
    let mut arguments = vec![state.into(), gradient.into(), gradient.len().into()];
    arguments.extend([scale, betas.0, betas.1, decay, rate, root, eps].map(Argument::Real));
    each(gpu, "adamw", gradient.len(), &arguments)
}

/// `destination = source + keep (destination - source)`, in place, in f32.
pub fn lerp<G: Gpu>(gpu: &G, destination: &Array, source: &Array, keep: f32) -> Result<()> {
    if [destination.dtype, source.dtype] != [DType::F32; 2] || destination.len() != source.len() {
        bail!("lerp: {source:?} does not fit {destination:?}");
    }
    each(gpu, "lerp", source.len(), &[destination.into(), source.into(), source.len().into(), keep.into()])
}

/// Cosines, then sines, of 1000 t times the frequencies: t `[B]` to `[B, 2 half]`, f32.
pub fn time_features<G: Gpu>(gpu: &G, t: &Array, half: usize) -> Result<G::Memory> {
    if t.dtype != DType::F32 {
        bail!("time_features: t is of {}, not f32", t.dtype.as_str());
    }
    let (memory, out) = allocate(gpu, DType::F32, &[t.len(), 2 * half])?;
    each(gpu, "time_features", t.len() * half, &[t.into(), (&out).into(), t.len().into(), half.into()])?;
    Ok(memory)
}
