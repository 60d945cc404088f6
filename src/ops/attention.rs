//! Softmax attention that never holds the T x T matrix, forward or back: queries go through in slices, and the
//! backward pass computes the softmax of a slice again.

use super::float::{Float, largest, matmul, sum, vectorised};
use super::kernel::{Kernel, View, fill, run};
use super::op::{Differentiable, apply3};
use candle_core::{Result, Tensor, bail};

/// Queries handled at once: the working memory is SLICE x T for each sample in work.
const SLICE: usize = 64;

/// softmax(q k^T / sqrt(d)) v for each sample and head.
#[derive(Default)]
pub(super) struct Attention {
    /// What the GPU's forward pass keeps for its backward pass: the logarithms of the softmax's sums.
    #[cfg(feature = "cuda")]
    pub(super) lse: std::sync::OnceLock<Tensor>,
}

/// [B, T, H, d] of an input, checked against the others.
fn sizes<F>(q: View<F>, k: View<F>, v: View<F>) -> Result<(usize, usize, usize)> {
    let &[_, tokens, heads, dim] = q.shape else { bail!("attention: {:?} is not [B, T, H, d]", q.shape) };
    if q.shape != k.shape || q.shape != v.shape {
        bail!("attention: {:?}, {:?} and {:?} differ", q.shape, k.shape, v.shape);
    }
    Ok((tokens, heads, dim))
}

/// Rows of `p` `[rows, tokens]` become their softmax.
fn softmax_rows<F: Float>(p: &mut [F], tokens: usize) {
    vectorised(|| {
        for row in p.chunks_exact_mut(tokens) {
            let largest = largest(row);
            for x in row.iter_mut() {
                *x = Float::exp(*x - largest);
            }
            let scale = F::ONE / sum(row);
            for x in row.iter_mut() {
                *x *= scale;
            }
        }
    });
}

impl Kernel<3> for Attention {
    const NAME: &'static str = "attention";
    fn run<F: Float>(&self, [q, k, v]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        let (tokens, heads, dim) = sizes(q, k, v)?;
        let width = heads * dim;
        let scale = F::of((dim as f64).powf(-0.5));
        let mut out = vec![F::ZERO; q.data.len()];
        fill(&mut out, tokens * width, |sample, out| {
            let at = sample * tokens * width;
            let mut p = vec![F::ZERO; SLICE.min(tokens) * tokens];
            for head in 0..heads {
                let at = at + head * dim;
                for start in (0..tokens).step_by(SLICE) {
                    let rows = SLICE.min(tokens - start);
                    let p = &mut p[..rows * tokens];
                    let queries = (&q.data[at + start * width..], width, 1);
                    matmul((rows, dim, tokens), queries, (&k.data[at..], 1, width), p, tokens, scale, false, 1);
                    softmax_rows(p, tokens);
                    let o = &mut out[start * width + head * dim..];
                    matmul((rows, tokens, dim), (p, tokens, 1), (&v.data[at..], width, 1), o, width, F::ONE, false, 1);
                }
            }
        });
        Ok((out, q.shape.to_vec()))
    }
}

/// (q, k, v, dy) -> for each sample [dq | dk | dv].
struct AttentionBackward;

impl Kernel<4> for AttentionBackward {
    const NAME: &'static str = "attention";
    fn run<F: Float>(&self, [q, k, v, dy]: [View<F>; 4]) -> Result<(Vec<F>, Vec<usize>)> {
        let (tokens, heads, dim) = sizes(q, k, v)?;
        let width = heads * dim;
        let scale = F::of((dim as f64).powf(-0.5));
        let batch = q.shape[0];
        let mut out = vec![F::ZERO; 3 * q.data.len()];
        fill(&mut out, 3 * tokens * width, |sample, out| {
            let at = sample * tokens * width;
            let (dq, rest) = out.split_at_mut(tokens * width);
            let (dk, dv) = rest.split_at_mut(tokens * width);
            let mut p = vec![F::ZERO; SLICE.min(tokens) * tokens];
            let mut dp = p.clone();
            for head in 0..heads {
                let (at, column) = (at + head * dim, head * dim);
                for start in (0..tokens).step_by(SLICE) {
                    let rows = SLICE.min(tokens - start);
                    let (p, dp) = (&mut p[..rows * tokens], &mut dp[..rows * tokens]);
                    let queries = &q.data[at + start * width..];
                    let gradient = &dy.data[at + start * width..];
                    let keys = &k.data[at..];
                    matmul((rows, dim, tokens), (queries, width, 1), (keys, 1, width), p, tokens, scale, false, 1);
                    softmax_rows(p, tokens);
                    let values = (&v.data[at..], 1, width);
                    matmul((rows, dim, tokens), (gradient, width, 1), values, dp, tokens, F::ONE, false, 1);
                    // dv += p^T dy, then dp becomes the gradient of the logits: p (dp - sum(p dp)).
                    let (pt, g) = ((&*p, 1, tokens), (gradient, width, 1));
                    matmul((tokens, rows, dim), pt, g, &mut dv[column..], width, F::ONE, true, 1);
                    softmax_backward_rows(p, dp, tokens);
                    let slice = &mut dq[start * width + column..];
                    matmul((rows, tokens, dim), (dp, tokens, 1), (keys, width, 1), slice, width, scale, false, 1);
                    let (dpt, qs) = ((&*dp, 1, tokens), (queries, width, 1));
                    matmul((tokens, rows, dim), dpt, qs, &mut dk[column..], width, scale, true, 1);
                }
            }
        });
        Ok((out, vec![batch, 3, tokens, heads, dim]))
    }
}

/// `dp` becomes p (dp - sum(p dp)), row by row.
fn softmax_backward_rows<F: Float>(p: &[F], dp: &mut [F], tokens: usize) {
    vectorised(|| {
        for (p, dp) in p.chunks_exact(tokens).zip(dp.chunks_exact_mut(tokens)) {
            let inner = super::float::dot(p, dp);
            for (dp, &p) in dp.iter_mut().zip(p) {
                *dp = p * (*dp - inner);
            }
        }
    });
}

impl Differentiable<3> for Attention {
    fn backward(&self, [q, k, v]: [&Tensor; 3], _: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let packed = run(&AttentionBackward, [q, k, v, dy])?; // [B, 3, T, H, d]
        let part = |i: usize, t: &Tensor| t.track_op().then(|| packed.get_on_dim(1, i)?.contiguous()).transpose();
        Ok([part(0, q)?, part(1, k)?, part(2, v)?])
    }
}

/// `softmax(q k^T / sqrt(d)) v` for each head: q, k, v and the result `[B, T, H, d]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    apply3(Attention::default(), q, k, v)
}
