//! `kernels/attention.cu`, and on Hopper `kernels/attention_hopper.cu`, for heads of 64 features in bf16;
//! `kernels/attention_any.cu` for the rest.

use super::gpu::{Argument, Array, Gpu, Launch, allocate, ceil, suffix};
use candle_core::{DType, Result, bail};

/// The heads of the matrix units' kernels, and the rows of a block there, each of two threads.
const DIM: usize = 64;
const ROWS: usize = 64;

/// What a place of the ring in attention_hopper.cu holds, in bytes: two tiles, and two numbers a row, up to the whole
/// kilobyte.
const TILES: usize = 2 * 64 * DIM * 2;
const LINES: usize = 1024;

/// Threads of a block with a warp a row.
const THREADS: usize = 128;

/// Features of the widest head, and of the widest whose row a few registers hold.
const WIDEST: usize = 512;
const NARROW: usize = 128;

/// [B, T, H, d], and how logits are scaled.
struct Sizes {
    batch: usize,
    tokens: usize,
    heads: usize,
    dim: usize,
}

impl Sizes {
    fn of(q: &Array, k: &Array, v: &Array) -> Result<Self> {
        let &[batch, tokens, heads, dim] = &q.shape[..] else { bail!("attention: {:?} is not [B, T, H, d]", q.shape) };
        if q.shape != k.shape || q.shape != v.shape {
            bail!("attention: {:?}, {:?} and {:?} differ", q.shape, k.shape, v.shape);
        }
        if dim > WIDEST {
            bail!("attention: a head of {dim} features; the GPU's kernels take up to {WIDEST}");
        }
        Ok(Self { batch, tokens, heads, dim })
    }

    fn rows(&self) -> usize {
        self.batch * self.tokens * self.heads
    }

    /// 1 / sqrt(d).
    fn factor(&self) -> f32 {
        (self.dim as f64).powf(-0.5) as f32
    }

    /// The same for powers of two.
    fn scale(&self) -> f32 {
        ((self.dim as f64).powf(-0.5) * std::f64::consts::LOG2_E) as f32
    }

    /// Whether the matrix units' kernels take these: they read 16 bytes at once.
    fn fits_matrix_units(&self, arrays: &[&Array]) -> bool {
        self.dim == DIM && arrays.iter().all(|a| a.dtype == DType::BF16 && a.pointer.is_multiple_of(16))
    }

    /// `kernel` is the end of its name, here and below.
    fn on_matrix_units<G: Gpu>(&self, gpu: &G, kernel: &str, arrays: &[&Array], rest: &[Argument]) -> Result<()> {
        let mut arguments = arrays.iter().map(|&a| a.into()).collect::<Vec<_>>();
        arguments.extend([Argument::Int(self.tokens as i32), Argument::Int(self.heads as i32)]);
        arguments.extend(rest);
        let (file, groups, shared) = match (gpu.is_hopper()?, kernel) {
            (false, _) => ("attention", 1, 0),
            (true, "_forward") => ("attention_hopper", 2, 3 * TILES),
            (true, "_backward_keys") => ("attention_hopper", 1, 4 * (TILES + LINES)),
            (true, _) => ("attention_hopper", 1, 4 * TILES),
        };
        let kernel = format!("{file}{kernel}");
        let (grid, threads) = ([ceil(self.tokens, groups * ROWS), self.heads, self.batch], [groups * THREADS, 1, 1]);
        gpu.launch(&Launch { file, kernel: &kernel, grid, threads, shared, arguments: &arguments })
    }

    /// Eight lanes a row.
    fn delta<G: Gpu>(&self, gpu: &G, out: &Array, d_out: &Array, delta: &Array) -> Result<()> {
        let mut arguments: Vec<Argument> = vec![out.into(), d_out.into(), delta.into(), self.rows().into()];
        arguments.extend([self.tokens, self.heads].map(|size| Argument::Int(size as i32)));
        let (grid, threads) = ([ceil(8 * self.rows(), THREADS), 1, 1], [THREADS, 1, 1]);
        let kernel = "attention_delta";
        gpu.launch(&Launch { file: "attention", kernel, grid, threads, shared: 0, arguments: &arguments })
    }

    /// A warp a row.
    fn on_any<G: Gpu>(&self, gpu: &G, kernel: &str, arrays: &[&Array], rest: &[Argument]) -> Result<()> {
        let mut arguments = arrays.iter().map(|&a| a.into()).collect::<Vec<_>>();
        arguments.push(self.rows().into());
        arguments.extend([self.tokens, self.heads, self.dim].map(|size| Argument::Int(size as i32)));
        arguments.extend(rest);
        let kind = if self.dim > NARROW { "wide" } else { "any" };
        let kernel = format!("attention_{kind}{kernel}_{}", suffix(arrays[0].dtype, "attention")?);
        let grid = [ceil(self.rows(), THREADS / 32), 1, 1];
        let threads = [THREADS, 1, 1];
        gpu.launch(&Launch { file: "attention_any", kernel: &kernel, grid, threads, shared: 0, arguments: &arguments })
    }
}

/// `softmax(q k^T / sqrt(d)) v` for each head, all `[B, T, H, d]`, and the logarithms (to base 2) of the softmax's sums
/// `[B, H, T]`, f32, which the backward pass wants.
pub fn attention<G: Gpu>(gpu: &G, q: &Array, k: &Array, v: &Array) -> Result<[G::Memory; 2]> {
    let sizes = Sizes::of(q, k, v)?;
    let (out_memory, out) = allocate(gpu, q.dtype, &q.shape)?;
    let (lse_memory, lse) = allocate(gpu, DType::F32, &[sizes.batch, sizes.heads, sizes.tokens])?;
    let (arrays, scale) = ([q, k, v, &out, &lse], [sizes.scale().into()]);
    match sizes.fits_matrix_units(&[q, k, v, &out]) {
        true => sizes.on_matrix_units(gpu, "_forward", &arrays, &scale)?,
        false => sizes.on_any(gpu, "", &arrays, &scale)?,
    }
    Ok([out_memory, lse_memory])
}

/// What the backward pass of [`attention`] is given.
#[derive(Debug, Clone, Copy)]
pub struct Backward<'a> {
    /// Queries.
    pub q: &'a Array,
    /// Keys.
    pub k: &'a Array,
    /// Values.
    pub v: &'a Array,
    /// The result.
    pub out: &'a Array,
    /// The logarithms of the softmax's sums.
    pub lse: &'a Array,
    /// The result's gradient.
    pub d_out: &'a Array,
}

impl Backward<'_> {
    /// Gradients of q, k and v.
    pub fn run<G: Gpu>(&self, gpu: &G) -> Result<[G::Memory; 3]> {
        let &Self { q, k, v, out, lse, d_out } = self;
        let sizes = Sizes::of(q, k, v)?;
        let (_delta, delta) = allocate(gpu, DType::F32, &lse.shape)?;
        let on_matrix_units = sizes.fits_matrix_units(&[q, k, v, d_out, out]);
        match on_matrix_units {
            true => sizes.delta(gpu, out, d_out, &delta)?,
            false => sizes.on_any(gpu, "_delta", &[out, d_out, &delta], &[])?,
        }
        let (dq_memory, dq) = allocate(gpu, q.dtype, &q.shape)?;
        let (dk_memory, dk) = allocate(gpu, q.dtype, &q.shape)?;
        let (dv_memory, dv) = allocate(gpu, q.dtype, &q.shape)?;
        let keys = [q, k, v, d_out, lse, &delta, &dk, &dv];
        let queries = [q, k, v, d_out, lse, &delta, &dq];
        let factors = [sizes.scale().into(), sizes.factor().into()];
        if on_matrix_units {
            sizes.on_matrix_units(gpu, "_backward_keys", &keys, &factors)?;
            sizes.on_matrix_units(gpu, "_backward_queries", &queries, &factors)?;
        } else {
            sizes.on_any(gpu, "_backward_keys", &keys, &factors)?;
            sizes.on_any(gpu, "_backward_queries", &queries, &factors)?;
        }
        Ok([dq_memory, dk_memory, dv_memory])
    }
}
