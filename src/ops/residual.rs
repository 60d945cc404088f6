//! The gated residual of a diffusion transformer's block.

use super::float::Float;
use super::kernel::{Kernel, View, fill, run};
use super::op::{Differentiable, apply3};
use candle_core::{Result, Tensor, bail};

/// x + gate * y.
pub(super) struct GatedResidual;

impl Kernel<3> for GatedResidual {
    const NAME: &'static str = "gated_residual";
    fn run<F: Float>(&self, [x, gate, y]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        let width = x.last();
        if x.shape != y.shape || gate.shape != [x.shape[0], width] {
            bail!("gated_residual: {:?}, gate {:?} and {:?} do not fit", x.shape, gate.shape, y.shape);
        }
        let mut out = vec![F::ZERO; x.data.len()];
        let sample = x.data.len() / x.shape[0].max(1);
        fill(&mut out, sample, |b, out| {
            let gate = &gate.data[b * width..][..width];
            let rows = x.data[b * sample..].chunks_exact(width).zip(y.data[b * sample..].chunks_exact(width));
            for (out, (x, y)) in out.chunks_exact_mut(width).zip(rows) {
                for i in 0..width {
                    out[i] = x[i] + gate[i] * y[i];
                }
            }
        });
        Ok((out, x.shape.to_vec()))
    }
}

/// (gate, y, d) -> for each sample [dy | dgate], without dgate if it is not wanted.
struct GatedResidualBackward {
    dgate: bool,
}

impl Kernel<3> for GatedResidualBackward {
    const NAME: &'static str = "gated_residual";
    fn run<F: Float>(&self, [gate, y, d]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        let (batch, width) = (gate.shape[0], gate.shape[1]);
        let sample = y.data.len() / batch.max(1);
        let rows = sample / width + usize::from(self.dgate);
        let mut out = vec![F::ZERO; batch * rows * width];
        fill(&mut out, rows * width, |b, out| {
            let gate = &gate.data[b * width..][..width];
            let (dy, dgate) = out.split_at_mut(sample);
            let rows = y.data[b * sample..].chunks_exact(width).zip(d.data[b * sample..].chunks_exact(width));
            for (dy, (y, d)) in dy.chunks_exact_mut(width).zip(rows) {
                for i in 0..width {
                    dy[i] = gate[i] * d[i];
                }
                for (dgate, (y, d)) in dgate.iter_mut().zip(y.iter().zip(d)) {
                    *dgate += *y * *d;
                }
            }
        });
        Ok((out, vec![batch, rows, width]))
    }
}

impl Differentiable<3> for GatedResidual {
    fn backward(&self, [x, gate, y]: [&Tensor; 3], _: &Tensor, d: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let dgate = gate.track_op();
        let packed = run(&GatedResidualBackward { dgate }, [gate, y, d])?; // [B, tokens + 1, D] or [B, tokens, D]
        let tokens = packed.dim(1)? - usize::from(dgate);
        Ok([
            x.track_op().then(|| d.clone()),
            dgate.then(|| packed.narrow(1, tokens, 1)?.reshape(gate.shape())).transpose()?,
            y.track_op().then(|| packed.narrow(1, 0, tokens)?.contiguous()?.reshape(y.shape())).transpose()?,
        ])
    }
}

/// `x + gate * y` with x and y `[B, .., D]` and gate `[B, D]`.
pub fn gated_residual(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    apply3(GatedResidual, x, gate, y)
}
