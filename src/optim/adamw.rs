//! AdamW in one pass over memory.

use super::OptimConfig;
#[cfg(feature = "cuda")]
use crate::cuda::array;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Result, Storage, Tensor};
use rayon::prelude::*;

/// Elements handled at once by one thread; sums are over these pieces, whatever the number of threads.
const PIECE: usize = 1 << 16;

/// The master parameters and their moments: one f32 tensor `[3 S]` of parameters, first and second moments, so that an
/// update reads and writes each number once.
pub(super) struct AdamW {
    state: Tensor,
    len: usize,
}

/// AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), as torch computes it.
struct Step {
    config: OptimConfig,
    scale: f64,
    lr: f64,
    /// 1 - beta^n for both moments.
    correction: (f64, f64),
}

impl AdamW {
    /// Fresh moments for the parameters `master` `[S]`.
    pub fn new(master: &Tensor) -> Result<Self> {
        let len = master.elem_count();
        let state = Tensor::zeros(3 * len, DType::F32, master.device())?;
        state.slice_set(master, 0, 0)?;
        Ok(Self { state, len })
    }

    /// The state of a checkpoint.
    pub fn restore(parts: &[Tensor; 3]) -> Result<Self> {
        Ok(Self { state: Tensor::cat(parts, 0)?, len: parts[0].elem_count() })
    }

    /// Parameters (0), first moments (1) or second moments (2), `[S]`, sharing memory with the state.
    pub fn part(&self, index: usize) -> Result<Tensor> {
        self.state.narrow(0, index * self.len, self.len)
    }

    /// Update number `n` (from 1) with the gradient `[S]` times `scale`.
    pub fn step(&mut self, gradient: &Tensor, scale: f64, lr: f64, n: u64, config: &OptimConfig) -> Result<()> {
        let correction = |beta: f64| 1.0 - beta.powf(n as f64);
        let correction = (correction(config.betas.0), correction(config.betas.1));
        self.state.inplace_op2(gradient, &Step { config: config.clone(), scale, lr, correction })
    }
}

impl InplaceOp2 for Step {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, state: &mut CpuStorage, _: &Layout, gradient: &CpuStorage, l: &Layout) -> Result<()> {
        let (CpuStorage::F32(state), CpuStorage::F32(gradient), Some((start, end))) =
            (state, gradient, l.contiguous_offsets())
        else {
            candle_core::bail!("adamw: f32 and contiguous only");
        };
        let gradient = &gradient[start..end];
        let (master, moments) = state.split_at_mut(gradient.len());
        let (first, second) = moments.split_at_mut(gradient.len());
        let (beta1, beta2) = (self.config.betas.0 as f32, self.config.betas.1 as f32);
        let decay = (1.0 - self.lr * self.config.weight_decay) as f32;
        let rate = (self.lr / self.correction.0) as f32;
        let (root, eps, scale) = (self.correction.1.sqrt() as f32, self.config.eps as f32, self.scale as f32);
        let moments = first.par_chunks_mut(PIECE).zip(second.par_chunks_mut(PIECE));
        let pieces = master.par_chunks_mut(PIECE).zip(moments).zip(gradient.par_chunks(PIECE));
        pieces.for_each(|((master, (first, second)), gradient)| {
            pulp::Arch::new().dispatch(|| {
                for (((p, m), v), &g) in master.iter_mut().zip(first).zip(second).zip(gradient) {
                    let g = g * scale;
                    *m = beta1 * *m + (1.0 - beta1) * g;
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    *p = *p * decay - rate * *m / (v.sqrt() / root + eps);
                }
            });
        });
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, state: &mut CudaStorage, sl: &Layout, gradient: &CudaStorage, gl: &Layout) -> Result<()> {
        let numbers = crate::cuda::elementwise::AdamwNumbers {
            scale: self.scale as f32,
            betas: (self.config.betas.0 as f32, self.config.betas.1 as f32),
            decay: (1.0 - self.lr * self.config.weight_decay) as f32,
            rate: (self.lr / self.correction.0) as f32,
            root: self.correction.1.sqrt() as f32,
            eps: self.config.eps as f32,
        };
        let (state, gradient, gpu) = (array(state, sl)?, array(gradient, gl)?, &gradient.device);
        crate::cuda::elementwise::adamw(gpu, &state, &gradient, numbers)
    }
}

/// Sum of squares of a contiguous f32 tensor, in f64, `[1]`.
pub(super) fn square_sum(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let (Storage::Cuda(storage), layout) = (&*x.storage_and_layout().0, x.layout()) {
        let (sums, pieces) = crate::cuda::reduce::square_sums(&storage.device, &crate::cuda::array(storage, layout)?)?;
        return crate::cuda::tensor(sums, pieces).sum_all()?.reshape(1);
    }
    let (storage, layout) = x.storage_and_layout();
    let (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        candle_core::bail!("square_sum: f32 and contiguous only");
    };
    let values = &values[start..end];
    let sums: Vec<f64> =
        values.par_chunks(PIECE).map(|piece| pulp::Arch::new().dispatch(|| square_sum_of(piece))).collect();
    Tensor::new(&[sums.into_iter().sum::<f64>()], &Device::Cpu)
}

/// In a fixed order, by independent sums that the compiler can keep in one vector.
#[inline(always)]
fn square_sum_of(piece: &[f32]) -> f64 {
    let mut lanes = [0f64; 16];
    let chunks = piece.chunks_exact(lanes.len());
    let rest: f64 = chunks.remainder().iter().map(|&x| f64::from(x).powi(2)).sum();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    lanes.into_iter().fold(rest, |sum, lane| sum + lane)
}

/// `destination = source - keep * (source - destination)`, in place: two equal vectors stay equal to the bit, which they
/// would not with the rounded factors `keep` and `1 - keep`, nor, where they hold -0, with a sum.
pub(super) struct Lerp(pub f64);

impl InplaceOp2 for Lerp {
    fn name(&self) -> &'static str {
        "lerp"
    }

    fn cpu_fwd(&self, dst: &mut CpuStorage, dl: &Layout, src: &CpuStorage, sl: &Layout) -> Result<()> {
        let (CpuStorage::F32(dst), CpuStorage::F32(src), Some(d), Some(s)) =
            (dst, src, dl.contiguous_offsets(), sl.contiguous_offsets())
        else {
            candle_core::bail!("lerp: f32 and contiguous only");
        };
        let keep = self.0 as f32;
        let pieces = dst[d.0..d.1].par_chunks_mut(PIECE).zip(src[s.0..s.1].par_chunks(PIECE));
        pieces.for_each(|(dst, src)| {
            pulp::Arch::new().dispatch(|| {
                for (d, &s) in dst.iter_mut().zip(src) {
                    *d = s - keep * (s - *d);
                }
            });
        });
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, dst: &mut CudaStorage, dl: &Layout, src: &CudaStorage, sl: &Layout) -> Result<()> {
        crate::cuda::elementwise::lerp(&src.device, &array(dst, dl)?, &array(src, sl)?, self.0 as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};
    use candle_core::Device;
    use candle_core::Var;
    use candle_nn::Optimizer;

    fn bits(x: &Tensor) -> Result<Vec<u32>> {
        Ok(x.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    }

    /// Else the old policy's velocity differs from an equal policy's by rounding, and where nothing else is in the gradient
    /// AdamW scales that up to whole steps.
    #[test]
    fn a_slow_copy_stays_equal_to_what_it_equals() -> Result<()> {
        let mut values = Stream::new(1, Purpose::Parameters, [0; 4]).normals(999);
        values.push(-0.0);
        let source = Tensor::from_vec(values, 1000, &Device::Cpu)?;
        for keep in [0.0, 0.01, 0.3, 0.999] {
            let copy = source.copy()?;
            copy.inplace_op2(&source, &Lerp(keep))?;
            assert_eq!(bits(&copy)?, bits(&source)?, "keep {keep}");
            let apart = source.affine(3.0, 1.0)?;
            apart.inplace_op2(&source, &Lerp(keep))?;
            let expected = source.affine(1.0 + 2.0 * keep, keep)?;
            let error = (apart - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(error < 2e-6, "keep {keep}: {error}");
        }
        Ok(())
    }

    #[test]
    fn squares_are_summed_as_by_hand() -> Result<()> {
        for len in [0, 1, 15, 16, 17, PIECE, PIECE + 3, 3 * PIECE - 1] {
            let values = Stream::new(2, Purpose::Parameters, [0; 4]).normals(len + 2);
            let expected: f64 = values[1..=len].iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let x = Tensor::from_vec(values, len + 2, &Device::Cpu)?.narrow(0, 1, len)?;
            let sum = square_sum(&x)?.to_vec1::<f64>()?[0];
            assert!((sum - expected).abs() <= 1e-12 * expected, "{len}: {sum} instead of {expected}");
        }
        Ok(())
    }

    /// To the bit, the sign of a zero included; what weight decay takes is another matter.
    #[test]
    fn a_gradient_of_zero_moves_nothing() -> Result<()> {
        let mut values = Stream::new(1, Purpose::Parameters, [0; 4]).normals(60);
        values.extend([0.0, -0.0, f32::MIN_POSITIVE / 2.0, -1e30]);
        let master = Tensor::from_vec(values, 64, &Device::Cpu)?;
        let before = bits(&master)?;
        let mut adamw = AdamW::new(&master)?;
        let config = OptimConfig { weight_decay: 0.0, ..OptimConfig::default() };
        for (n, zero) in [(1, 0f32), (2, -0.0), (3, 0.0)] {
            adamw.step(&Tensor::full(zero, 64, &Device::Cpu)?, 1.0, 1e-2, n, &config)?;
        }
        assert_eq!(bits(&adamw.part(0)?)?, before);
        assert_eq!(adamw.part(1)?.to_vec1::<f32>()?, [0.0; 64]);
        Ok(())
    }

    /// Against candle-nn's AdamW, an implementation by others, over 20 updates with clipped gradients.
    #[test]
    fn parameters_follow_candle_nn() -> Result<()> {
        let config = OptimConfig { lr: 1e-2, weight_decay: 0.1, ..OptimConfig::default() };
        let noise =
            |i| Tensor::from_vec(Stream::new(1, Purpose::Parameters, [i, 0, 0, 0]).normals(50), 50, &Device::Cpu);
        let var = Var::from_tensor(&noise(0)?)?;
        let mut ours = AdamW::new(&noise(0)?)?;
        let params = candle_nn::ParamsAdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
        let mut theirs = candle_nn::AdamW::new(vec![var.clone()], params)?;
        for n in 1..=20 {
            let gradient = noise(n)?;
            theirs.backward_step(&(var.as_tensor() * (&gradient * 0.3)?)?.sum_all()?)?;
            ours.step(&gradient, 0.3, 1e-2, n, &config)?;
        }
        let (a, b) = (ours.part(0)?.to_vec1::<f32>()?, var.to_vec1::<f32>()?);
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-6 * (1.0 + b.abs())), "{a:?} {b:?}");
        Ok(())
    }
}
