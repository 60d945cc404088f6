//! Group normalisation of pictures with the channels last, with the activation that follows it.

use super::activation::sigmoid;
use super::float::Float;
use super::kernel::{Kernel, View, fill, frozen};
use candle_core::{Result, Tensor, bail};

/// Pixels handled at once by one thread, a few hundred KiB.
const BLOCK: usize = 256;

struct GroupNorm {
    groups: usize,
    eps: f64,
    silu: bool,
}

impl GroupNorm {
    /// Mean and squared deviation of each channel in each block of pixels of a picture: `[blocks, 2, C]`. Within the
    /// block deviations are from the block's own mean, so that no digits are lost and the picture is read once.
    fn moments<F: Float>(x: &[F], channels: usize) -> Vec<F> {
        let blocks = x.len().div_ceil(BLOCK * channels);
        let mut moments = vec![F::ZERO; blocks * 2 * channels];
        fill(&mut moments, 2 * channels, |block, moments| {
            let (mean, square) = moments.split_at_mut(channels);
            let x = x.chunks(BLOCK * channels).nth(block).unwrap_or_default();
            for pixel in x.chunks_exact(channels) {
                for (mean, &x) in mean.iter_mut().zip(pixel) {
                    *mean += x;
                }
            }
            let share = F::ONE / F::of((x.len() / channels) as f64);
            for mean in mean.iter_mut() {
                *mean *= share;
            }
            for pixel in x.chunks_exact(channels) {
                for ((square, &mean), &x) in square.iter_mut().zip(&*mean).zip(pixel) {
                    *square += (x - mean) * (x - mean);
                }
            }
        });
        moments
    }

    /// Each channel's factor and summand, from the moments of its group, which are put together in f64.
    fn affine<F: Float>(&self, moments: &[F], pixels: usize, weight: &[F], bias: &[F]) -> Vec<(F, F)> {
        let (channels, size) = (weight.len(), weight.len() / self.groups);
        let count = |block: usize| BLOCK.min(pixels - block * BLOCK) as f64;
        let blocks = || moments.chunks_exact(2 * channels).enumerate();
        let mut affine = Vec::with_capacity(channels);
        for group in (0..channels).step_by(size) {
            let means = |m: &[F]| m[group..group + size].iter().map(|m| m.to_f64()).sum::<f64>();
            let total = (pixels * size) as f64;
            let mean = blocks().map(|(i, m)| count(i) * means(m)).sum::<f64>() / total;
            let square = |i: usize, m: &[F]| -> f64 {
                let of = |c: usize| m[channels + c].to_f64() + count(i) * (m[c].to_f64() - mean).powi(2);
                (group..group + size).map(of).sum()
            };
            let variance = blocks().map(|(i, m)| square(i, m)).sum::<f64>() / total;
            let rstd = 1.0 / (variance + self.eps).sqrt();
            affine.extend((group..group + size).map(|c| {
                let factor = rstd * weight[c].to_f64();
                (F::of(factor), F::of(bias[c].to_f64() - mean * factor))
            }));
        }
        affine
    }
}

impl Kernel<3> for GroupNorm {
    const NAME: &'static str = "group_norm";
    fn run<F: Float>(&self, [x, weight, bias]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        let channels = x.last();
        let batch = x.shape.first().copied().unwrap_or(1);
        if weight.shape != [channels]
            || bias.shape != [channels]
            || self.groups == 0
            || !channels.is_multiple_of(self.groups)
        {
            bail!("group_norm: weight {:?} and {} groups do not fit {:?}", weight.shape, self.groups, x.shape);
        }
        let mut out = vec![F::ZERO; x.data.len()];
        let len = (x.data.len() / batch.max(1)).max(1);
        for (out, x) in out.chunks_mut(len).zip(x.data.chunks(len)) {
            let affine = self.affine(&Self::moments(x, channels), len / channels, weight.data, bias.data);
            fill(out, BLOCK * channels, |block, out| {
                let x = &x[block * BLOCK * channels..];
                for (out, x) in out.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                    for ((out, &x), &(factor, summand)) in out.iter_mut().zip(x).zip(&affine) {
                        let y = x * factor + summand;
                        *out = if self.silu { y * sigmoid(y) } else { y };
                    }
                }
            });
        }
        Ok((out, x.shape.to_vec()))
    }
}

/// Group normalisation (Wu and He, arXiv 1803.08494) of x `[B, .., C]` over each sample's pixels and C / `groups`
/// channels, with weight and bias `[C]`, then SiLU if wanted. Without a derivative.
pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, eps: f64, silu: bool) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda::group_norm(x, weight, bias, groups, eps, silu);
    }
    frozen(&GroupNorm { groups, eps, silu }, [x, weight, bias])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};
    use candle_core::{DType, Device};

    fn noise(id: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let values = Stream::new(17, Purpose::Parameters, [id, 0, 0, 0]).normals(shape.iter().product());
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
    }

    fn composed(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, silu: bool) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let grouped = x.reshape((batch, height * width, groups, channels / groups))?;
        let centred = grouped.broadcast_sub(&grouped.mean_keepdim((1, 3))?)?;
        let deviation = (centred.sqr()?.mean_keepdim((1, 3))? + 1e-6)?.sqrt()?;
        let y = centred.broadcast_div(&deviation)?.reshape(x.shape())?.broadcast_mul(weight)?.broadcast_add(bias)?;
        if silu { y.silu() } else { Ok(y) }
    }

    #[test]
    fn equals_the_composed_form() -> Result<()> {
        for (height, width) in [(1, 1), (9, 7), (16, 16), (37, 29)] {
            let inputs = |dtype| -> Result<[Tensor; 3]> {
                // Far from zero, where a one-pass variance loses its digits.
                let x = noise(1, &[2, height, width, 12], dtype)?.affine(0.5, 20.0)?;
                Ok([x, noise(2, &[12], dtype)?, noise(3, &[12], dtype)?])
            };
            let ([x, w, b], exact) = (inputs(DType::F32)?, inputs(DType::F64)?);
            for silu in [false, true] {
                let wanted = composed(&exact[0], &exact[1], &exact[2], 4, silu)?;
                let in_f64 = group_norm(&exact[0], &exact[1], &exact[2], 4, 1e-6, silu)?;
                let in_f32 = group_norm(&x, &w, &b, 4, 1e-6, silu)?.to_dtype(DType::F64)?;
                for (ours, tolerance) in [(in_f64, 1e-11), (in_f32, 1e-4)] {
                    let error = (ours - &wanted)?.abs()?.max_all()?.to_scalar::<f64>()?;
                    assert!(error <= tolerance, "{height} x {width}, silu {silu}: {error:.1e}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() -> Result<()> {
        let (x, w) = (noise(1, &[1, 2, 2, 6], DType::F32)?, noise(2, &[6], DType::F32)?);
        assert!(group_norm(&x, &w, &w, 4, 1e-6, false).is_err());
        assert!(group_norm(&x, &noise(2, &[3], DType::F32)?, &w, 3, 1e-6, false).is_err());
        assert!(group_norm(&x, &w, &w, 3, 1e-6, false).is_ok());
        Ok(())
    }
}
