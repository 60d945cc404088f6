//! AdamW in one pass over memory.

use super::OptimConfig;
#[cfg(feature = "cuda")]
use crate::cuda::array;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor};

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
        pulp::Arch::new().dispatch(|| {
            for i in 0..gradient.len() {
                let g = gradient[i] * scale;
                first[i] = beta1 * first[i] + (1.0 - beta1) * g;
                second[i] = beta2 * second[i] + (1.0 - beta2) * g * g;
                master[i] = master[i] * decay - rate * first[i] / (second[i].sqrt() / root + eps);
            }
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
    if let (candle_core::Storage::Cuda(storage), layout) = (&*x.storage_and_layout().0, x.layout()) {
        let (sums, pieces) = crate::cuda::reduce::square_sums(&storage.device, &crate::cuda::array(storage, layout)?)?;
        return crate::cuda::tensor(sums, pieces).sum_all()?.reshape(1);
    }
    x.to_dtype(DType::F64)?.sqr()?.sum_all()?.reshape(1)
}

/// `destination = source + keep * (destination - source)`, in place: two equal vectors stay equal, which they would not
/// with the rounded factors `keep` and `1 - keep`.
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
        for (d, &s) in dst[d.0..d.1].iter_mut().zip(&src[s.0..s.1]) {
            *d = s + keep * (*d - s);
        }
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

    /// Else the old policy's velocity differs from an equal policy's by rounding, and where nothing else is in the gradient
    /// AdamW scales that up to whole steps.
    #[test]
    fn a_slow_copy_stays_equal_to_what_it_equals() -> Result<()> {
        let values = Stream::new(1, Purpose::Parameters, [0; 4]).normals(1000);
        let source = Tensor::from_vec(values, 1000, &Device::Cpu)?;
        for keep in [0.0, 0.01, 0.3, 0.999] {
            let copy = source.copy()?;
            copy.inplace_op2(&source, &Lerp(keep))?;
            assert_eq!(copy.to_vec1::<f32>()?, source.to_vec1::<f32>()?, "keep {keep}");
            let apart = source.affine(3.0, 1.0)?;
            apart.inplace_op2(&source, &Lerp(keep))?;
            let expected = source.affine(1.0 + 2.0 * keep, keep)?;
            let error = (apart - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(error < 2e-6, "keep {keep}: {error}");
        }
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
