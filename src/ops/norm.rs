//! Normalisations over the last dimension, with what always follows them in a diffusion transformer.

use super::float::{Float, dot, sum};
use super::join;
use super::kernel::{Kernel, View, fill, run};
use super::op::{Differentiable, apply2, apply3};
use candle_core::{Result, Tensor, bail};

/// Mean (0 for RMS) and reciprocal deviation of a row.
#[inline(always)]
fn statistics<F: Float>(row: &[F], centred: bool, eps: f64) -> (F, F) {
    let n = F::of(row.len() as f64);
    let mean = if centred { sum(row) / n } else { F::ZERO };
    // The two-pass variance: E[x^2] - mean^2 loses all digits for rows far from zero.
    let square = super::float::sum_pairs(row, row, |x, _| (x - mean) * (x - mean)) / n;
    (mean, F::ONE / Float::sqrt(square + F::of(eps)))
}

/// LayerNorm without affine parameters, then x (1 + scale) + shift: adaLN (Peebles and Xie, arXiv 2212.09748).
#[derive(Clone, Copy)]
pub(super) struct LayerNormModulate {
    pub(super) eps: f64,
}

/// Tokens a sample and width of x `[B, .., D]`, with shift and scale `[B, D]`.
fn per_sample<F>(x: View<F>, other: View<F>, name: &str) -> Result<(usize, usize)> {
    let width = x.last();
    let batch = x.shape.first().copied().unwrap_or(1);
    if other.shape != [batch, width] {
        bail!("{name}: {:?} does not fit {:?}", other.shape, x.shape);
    }
    Ok((x.data.len() / (batch * width).max(1), width))
}

impl Kernel<3> for LayerNormModulate {
    const NAME: &'static str = "layer_norm_modulate";
    fn run<F: Float>(&self, [x, shift, scale]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        let (tokens, width) = per_sample(x, shift, Self::NAME)?;
        per_sample(x, scale, Self::NAME)?;
        let mut out = vec![F::ZERO; x.data.len()];
        fill(&mut out, tokens * width, |sample, out| {
            let (shift, scale) = (&shift.data[sample * width..][..width], &scale.data[sample * width..][..width]);
            let x = &x.data[sample * tokens * width..];
            for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                let (mean, rstd) = statistics(x, true, self.eps);
                for i in 0..width {
                    out[i] = (x[i] - mean) * rstd * (F::ONE + scale[i]) + shift[i];
                }
            }
        });
        Ok((out, x.shape.to_vec()))
    }
}

/// (x, scale, dy) -> for each sample [dx | dshift | dscale], without the latter two if they are not wanted.
struct LayerNormModulateBackward {
    eps: f64,
    modulation: bool,
}

impl Kernel<3> for LayerNormModulateBackward {
    const NAME: &'static str = "layer_norm_modulate";
    fn run<F: Float>(&self, [x, scale, dy]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        let (tokens, width) = per_sample(x, scale, Self::NAME)?;
        let extra = if self.modulation { 2 } else { 0 };
        let piece = (tokens + extra) * width;
        let batch = x.shape[0];
        let mut out = vec![F::ZERO; batch * piece];
        let n = F::of(width as f64);
        fill(&mut out, piece, |sample, out| {
            let scale = &scale.data[sample * width..][..width];
            let at = sample * tokens * width;
            let (x, dy) = (&x.data[at..][..tokens * width], &dy.data[at..][..tokens * width]);
            let (dx, rest) = out.split_at_mut(tokens * width);
            let (dshift, dscale) = rest.split_at_mut(width * extra / 2);
            let mut normal = vec![F::ZERO; width]; // the normalised row
            let mut inner = vec![F::ZERO; width]; // its gradient
            for ((dx, x), dy) in dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(dy.chunks_exact(width)) {
                let (mean, rstd) = statistics(x, true, self.eps);
                for i in 0..width {
                    normal[i] = (x[i] - mean) * rstd;
                    inner[i] = dy[i] * (F::ONE + scale[i]);
                }
                for (i, (dshift, dscale)) in dshift.iter_mut().zip(&mut *dscale).enumerate() {
                    *dshift += dy[i];
                    *dscale += dy[i] * normal[i];
                }
                let (mean_inner, mean_product) = (sum(&inner) / n, dot(&inner, &normal) / n);
                for i in 0..width {
                    dx[i] = rstd * (inner[i] - mean_inner - normal[i] * mean_product);
                }
            }
        });
        Ok((out, vec![batch, tokens + extra, width]))
    }
}

impl Differentiable<3> for LayerNormModulate {
    fn backward(&self, [x, shift, scale]: [&Tensor; 3], _: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let modulation = shift.track_op() || scale.track_op();
        let kernel = LayerNormModulateBackward { eps: self.eps, modulation };
        let packed = run(&kernel, [x, scale, dy])?; // [B, tokens + 2, D] or [B, tokens, D]
        let tokens = packed.dim(1)? - if modulation { 2 } else { 0 };
        Ok([
            Some(packed.narrow(1, 0, tokens)?.contiguous()?.reshape(x.shape())?),
            shift.track_op().then(|| packed.narrow(1, tokens, 1)?.reshape(shift.shape())).transpose()?,
            scale.track_op().then(|| packed.narrow(1, tokens + 1, 1)?.reshape(scale.shape())).transpose()?,
        ])
    }
}

/// `LayerNorm(x) (1 + scale) + shift` with x `[B, .., D]`, shift and scale `[B, D]`.
pub fn layer_norm_modulate(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    apply3(LayerNormModulate { eps }, x, shift, scale)
}

/// x / rms(x) * weight (Zhang and Sennrich, arXiv 1910.07467).
#[derive(Clone, Copy)]
pub(super) struct RmsNorm {
    pub(super) eps: f64,
}

/// Rows handled at once by one thread.
const ROWS: usize = 256;

impl Kernel<2> for RmsNorm {
    const NAME: &'static str = "rms_norm";
    fn run<F: Float>(&self, [x, weight]: [View<F>; 2]) -> Result<(Vec<F>, Vec<usize>)> {
        let width = x.last();
        if weight.data.len() != width {
            bail!("rms_norm: weight {:?} does not fit {:?}", weight.shape, x.shape);
        }
        let mut out = vec![F::ZERO; x.data.len()];
        fill(&mut out, ROWS * width, |piece, out| {
            let x = &x.data[piece * ROWS * width..];
            for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                let (_, rstd) = statistics(x, false, self.eps);
                for i in 0..width {
                    out[i] = x[i] * rstd * weight.data[i];
                }
            }
        });
        Ok((out, x.shape.to_vec()))
    }
}

/// (x, weight, dy) -> [dx | dweight], flat, without dweight if it is not wanted.
struct RmsNormBackward {
    eps: f64,
    dweight: bool,
}

impl RmsNormBackward {
    /// dx of some rows; adds to the weight's gradient, unless it has no elements.
    fn rows<F: Float>(&self, x: &[F], weight: &[F], dy: &[F], dx: &mut [F], dweight: &mut [F]) {
        let width = weight.len();
        let n = F::of(width as f64);
        let mut inner = vec![F::ZERO; width];
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width));
        for (dx, (x, dy)) in dx.chunks_exact_mut(width).zip(rows) {
            let (_, rstd) = statistics(x, false, self.eps);
            for i in 0..width {
                inner[i] = dy[i] * weight[i];
            }
            for (i, dweight) in dweight.iter_mut().enumerate() {
                *dweight += dy[i] * x[i] * rstd;
            }
            let mean_product = dot(&inner, x) * rstd / n;
            for i in 0..width {
                dx[i] = rstd * (inner[i] - x[i] * rstd * mean_product);
            }
        }
    }
}

impl Kernel<3> for RmsNormBackward {
    const NAME: &'static str = "rms_norm";
    fn run<F: Float>(&self, [x, weight, dy]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        let (width, len) = (x.last(), x.data.len());
        if !self.dweight {
            let mut dx = vec![F::ZERO; len];
            fill(&mut dx, ROWS * width, |piece, dx| {
                let at = piece * ROWS * width;
                self.rows(&x.data[at..], weight.data, &dy.data[at..], dx, &mut []);
            });
            return Ok((dx, vec![len]));
        }
        // The weight's gradient is summed piece by piece, in order, whatever the number of threads.
        let pieces = len.div_ceil(ROWS * width).max(1);
        let mut partial = vec![F::ZERO; pieces * (ROWS + 1) * width];
        fill(&mut partial, (ROWS + 1) * width, |piece, out| {
            let at = piece * ROWS * width;
            let (dx, dweight) = out.split_at_mut(ROWS * width);
            self.rows(&x.data[at..], weight.data, &dy.data[at..], dx, dweight);
        });
        let mut out = Vec::with_capacity(len + width);
        let mut dweight = vec![F::ZERO; width];
        for (piece, part) in partial.chunks_exact((ROWS + 1) * width).enumerate() {
            out.extend_from_slice(&part[..(len - piece * ROWS * width).min(ROWS * width)]);
            for (sum, &d) in dweight.iter_mut().zip(&part[ROWS * width..]) {
                *sum += d;
            }
        }
        out.extend(dweight);
        Ok((out, vec![len + width]))
    }
}

impl Differentiable<2> for RmsNorm {
    fn backward(&self, [x, weight]: [&Tensor; 2], _: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let kernel = RmsNormBackward { eps: self.eps, dweight: weight.track_op() };
        let packed = run(&kernel, [x, weight, dy])?;
        let dx = packed.narrow(0, 0, x.elem_count())?.reshape(x.shape())?;
        let dweight = || packed.narrow(0, x.elem_count(), weight.elem_count())?.reshape(weight.shape());
        Ok([Some(dx), kernel.dweight.then(dweight).transpose()?])
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension: x `[.., D]`, weight `[D]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    apply2(RmsNorm { eps }, x, weight)
}

/// [`join`] of two streams' heads, `[B, T, H, d]` and `[B, L, H, d]`, each after [`rms_norm`] by its weight `[d]`.
pub fn rms_norm_joined(streams: [(&Tensor, &Tensor); 2], eps: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(joined) = super::cuda::rms_norm_joined(streams, eps)? {
        return Ok(joined);
    }
    let [first, second] = streams.map(|(x, weight)| rms_norm(x, weight, eps));
    join(&first?, &second?)
}
