//! Convolution of pictures with the channels last, as one matrix product a tile.
//!
//! A tile of output pixels gathers one row of the kernel's neighbours at a time, whole runs of channels, and multiplies
//! it with that row's weights: the gathered matrix stays in a core's cache, whatever the size of the picture.

use super::Walk;
use super::float::{Float, matmul};
use super::kernel::{Kernel, View, fill, frozen};
use candle_core::{Result, Tensor, bail};

/// Output pixels of a tile: enough for the weights of a kernel row to be worth reading.
const TILE: usize = 256;

struct Convolution(Walk);

impl Convolution {
    /// The result starts as `start`, with all its values or those of one pixel.
    fn run<F: Float>(&self, x: View<F>, w: View<F>, start: [Option<View<F>>; 2]) -> Result<(Vec<F>, Vec<usize>)> {
        let &[batch, height, width, c_in] = x.shape else { bail!("convolution: {:?} is not [B, H, W, C]", x.shape) };
        let &[size, columns, w_in, c_out] = w.shape else {
            bail!("convolution: weight {:?} is not [k, k, in, out]", w.shape)
        };
        if w_in != c_in || size != columns || c_in * c_out == 0 {
            bail!("convolution: weight {:?} does not fit {:?}", w.shape, x.shape);
        }
        let shape = vec![batch, self.0.result(height), self.0.result(width), c_out];
        let (out_width, run) = (shape[2], size * c_in);
        let mut out = vec![F::ZERO; shape.iter().product()];
        let [bias, residual] = start;
        if bias.is_some_and(|b| b.shape != [c_out]) || residual.is_some_and(|r| r.shape != shape) {
            bail!("convolution: bias or residual does not fit the result {shape:?}");
        }
        let pixels = shape[1] * out_width;
        for (sample, out) in out.chunks_mut((pixels * c_out).max(1)).enumerate() {
            let x = &x.data[sample * height * width * c_in..][..height * width * c_in];
            let residual = residual.map(|r| &r.data[sample * pixels * c_out..][..pixels * c_out]);
            fill(out, TILE * c_out, |tile, out| {
                let first = tile * TILE;
                if let Some(residual) = residual {
                    out.copy_from_slice(&residual[first * c_out..][..out.len()]);
                }
                if let Some(bias) = bias {
                    for pixel in out.chunks_exact_mut(c_out) {
                        for (out, &b) in pixel.iter_mut().zip(bias.data) {
                            *out += b;
                        }
                    }
                }
                let count = out.len() / c_out;
                let mut gathered = vec![F::ZERO; count * run];
                for ky in 0..size {
                    for (at, neighbours) in (first..).zip(gathered.chunks_exact_mut(run)) {
                        let row = self.0.source(at / out_width, ky, size, height);
                        for (kx, neighbour) in neighbours.chunks_exact_mut(c_in).enumerate() {
                            match row.zip(self.0.source(at % out_width, kx, size, width)) {
                                Some((y, x_at)) => neighbour.copy_from_slice(&x[(y * width + x_at) * c_in..][..c_in]),
                                None => neighbour.fill(F::ZERO),
                            }
                        }
                    }
                    let weights = (&w.data[ky * run * c_out..], c_out, 1);
                    matmul((count, run, c_out), (&gathered, run, 1), weights, out, c_out, F::ONE, true, 1);
                }
            });
        }
        Ok((out, shape))
    }
}

impl Kernel<3> for Convolution {
    const NAME: &'static str = "convolution";
    fn run<F: Float>(&self, [x, w, b]: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        self.run(x, w, [Some(b), None])
    }
}

impl Kernel<4> for Convolution {
    const NAME: &'static str = "convolution";
    fn run<F: Float>(&self, [x, w, b, residual]: [View<F>; 4]) -> Result<(Vec<F>, Vec<usize>)> {
        self.run(x, w, [Some(b), Some(residual)])
    }
}

/// Convolution of x `[B, H, W, in]` with `weight` `[k, k, in, out]` and `bias` `[out]`, and `residual` added in the
/// same pass: `[B, H', W', out]`, the sizes as `walk` says. Without a derivative.
pub fn convolution(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    walk: Walk,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda::convolution(x, weight, bias, walk, residual);
    }
    match residual {
        Some(residual) => frozen(&Convolution(walk), [x, weight, bias, residual]),
        None => frozen(&Convolution(walk), [x, weight, bias]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};
    use candle_core::{DType, Device, Var};

    fn noise(id: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let values = Stream::new(13, Purpose::Parameters, [id, 0, 0, 0]).normals(shape.iter().product());
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
    }

    /// With candle's operations, channels first.
    fn composed(x: &Tensor, w: &Tensor, b: &Tensor, walk: Walk) -> Result<Tensor> {
        let (_, height, width, _) = x.dims4()?;
        let (x, w) = (x.permute((0, 3, 1, 2))?.contiguous()?, w.permute((3, 2, 0, 1))?.contiguous()?);
        let y = match walk {
            Walk::Same => x.conv2d(&w, w.dim(2)? / 2, 1, 1, 1)?,
            Walk::Half => x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?.conv2d(&w, 0, 2, 1, 1)?,
            Walk::Double => x.upsample_nearest2d(2 * height, 2 * width)?.conv2d(&w, 1, 1, 1, 1)?,
        };
        y.permute((0, 2, 3, 1))?.broadcast_add(b)
    }

    #[test]
    fn equals_the_composed_form_on_every_walk() -> Result<()> {
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F64, 1e-12)] {
            for (height, width, size, walk) in [
                (20, 15, 3, Walk::Same), // more than one tile
                (1, 1, 3, Walk::Same),
                (5, 4, 1, Walk::Same),
                (30, 29, 3, Walk::Half),
                (2, 3, 3, Walk::Half),
                (11, 13, 3, Walk::Double),
                (1, 2, 3, Walk::Double),
            ] {
                let x = noise(1, &[2, height, width, 5], dtype)?;
                let (w, b) = (noise(2, &[size, size, 5, 7], dtype)?, noise(3, &[7], dtype)?);
                let wanted = composed(&x, &w, &b, walk)?;
                let residual = noise(4, wanted.dims(), dtype)?;
                for (ours, wanted) in [
                    (convolution(&x, &w, &b, walk, None)?, wanted.clone()),
                    (convolution(&x, &w, &b, walk, Some(&residual))?, (wanted + &residual)?),
                ] {
                    assert_eq!(ours.dims(), wanted.dims());
                    let error = (ours - wanted)?.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                    assert!(error <= tolerance, "{walk:?} of {height} x {width} in {dtype:?}: {error:.1e}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit_and_what_wants_a_gradient() -> Result<()> {
        let (x, w) = (noise(1, &[1, 4, 4, 5], DType::F32)?, noise(2, &[3, 3, 5, 7], DType::F32)?);
        let bias = noise(3, &[7], DType::F32)?;
        let run = |x: &Tensor, w: &Tensor, residual| convolution(x, w, &bias, Walk::Same, residual);
        assert!(run(&x, &w, None).is_ok());
        assert!(run(&x, &noise(2, &[3, 3, 4, 7], DType::F32)?, None).is_err());
        assert!(run(&x, &noise(2, &[3, 3, 5, 6], DType::F32)?, None).is_err());
        assert!(run(&x, &w, Some(&x)).is_err());
        let error = run(Var::from_tensor(&x)?.as_tensor(), &w, None).expect_err("a variable").to_string();
        assert!(error.contains("has no derivative"), "{error}");
        Ok(())
    }
}
