//! The optimizer's state of one rank: its shard of the flat parameters.

use super::adamw::{AdamW, Lerp};
use super::{OldPolicyDecay, OptimConfig, ema_decay};
use crate::comm::{Communicator, ReduceOp};
use crate::error::{Error, Result};
use crate::params::Layout;
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::ops::Range;

/// This rank's shard: fp32 master parameters, AdamW's moments, the old policy and the EMA, each `[S]`.
///
/// Rank r holds elements `r S .. (r + 1) S` of the flat vector padded to `R S`.
pub struct Sharded {
    adamw: AdamW,
    old: Tensor,
    ema: Tensor,
    total: usize,
    rank: usize,
    world_size: usize,
    /// Updates taken so far.
    pub update: u64,
}

/// What an update did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Global norm of the gradient before clipping.
    pub norm: f64,
    /// The factor that clipping applied.
    pub scale: f64,
}

/// Names of the vectors in a checkpoint, in AdamW's order, then the slow copies.
const VECTORS: [&str; 5] = ["policy", "exp_avg", "exp_avg_sq", "old", "ema"];

impl Sharded {
    /// Starts from the flat parameters `[total]`, the same on every rank.
    pub fn new(flat: &Tensor, layout: &Layout, comm: &dyn Communicator) -> Result<Self> {
        let (rank, world_size) = (comm.rank(), comm.world_size());
        let shard = layout.total.div_ceil(world_size);
        let padding = Tensor::zeros(shard * world_size - layout.total, DType::F32, flat.device())?;
        let mine = Tensor::cat(&[flat, &padding], 0)?.narrow(0, rank * shard, shard)?;
        Ok(Self {
            adamw: AdamW::new(&mine)?,
            old: mine.force_contiguous()?,
            ema: mine.force_contiguous()?,
            total: layout.total,
            rank,
            world_size,
            update: 0,
        })
    }

    /// Length S of a shard.
    pub fn shard_len(&self) -> usize {
        self.total.div_ceil(self.world_size)
    }

    /// Length R S of the padded flat vector.
    pub fn padded_len(&self) -> usize {
        self.shard_len() * self.world_size
    }

    /// The part of the unpadded flat vector that this rank holds.
    pub fn range(&self) -> Range<usize> {
        let shard = self.shard_len();
        (self.rank * shard).min(self.total)..((self.rank + 1) * shard).min(self.total)
    }

    /// Reduces the gradients `[R S]` over the ranks, clips their global norm and takes one AdamW step on the shard.
    ///
    /// # Errors
    /// [`Error::NotFinite`] on every rank alike if any gradient is not finite; nothing was changed then.
    pub fn step(
        &mut self,
        gradients: &Tensor,
        config: &OptimConfig,
        lr: f64,
        comm: &dyn Communicator,
    ) -> Result<StepReport> {
        let gradient = comm.reduce_scatter(gradients, ReduceOp::Sum)?; // [S]
        let square = gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?.reshape(1)?;
        let norm = comm.all_reduce(&square, ReduceOp::Sum)?.to_vec1::<f64>()?[0].sqrt();
        if !norm.is_finite() {
            return Err(Error::NotFinite(format!(
                "update {}: the gradient's norm is {norm}; the weights were left alone",
                self.update + 1
            )));
        }
        // As torch.nn.utils.clip_grad_norm_.
        let scale = (config.clip / (norm + 1e-6)).min(1.0);
        self.update += 1;
        self.adamw.step(&gradient, scale, lr, self.update, config)?;
        Ok(StepReport { norm, scale })
    }

    /// The EMA follows the master parameters: after every update.
    pub fn update_ema(&mut self, largest_decay: f64) -> Result<()> {
        Ok(self.ema.inplace_op2(&self.adamw.part(0)?, &Lerp(ema_decay(self.update, largest_decay)))?)
    }

    /// The EMA follows the master parameters with a fixed decay.
    pub fn update_ema_fixed(&mut self, decay: f64) -> Result<()> {
        Ok(self.ema.inplace_op2(&self.adamw.part(0)?, &Lerp(decay))?)
    }

    /// The old policy follows the master parameters: after every iteration.
    pub fn update_old(&mut self, decay: OldPolicyDecay) -> Result<f64> {
        let eta = decay.eta(self.update);
        self.old.inplace_op2(&self.adamw.part(0)?, &Lerp(eta))?;
        Ok(eta)
    }

    /// All ranks' master parameters, `[R S]`.
    pub fn gather_policy(&self, comm: &dyn Communicator) -> Result<Tensor> {
        comm.all_gather(&self.adamw.part(0)?)
    }

    /// All ranks' old policy, `[R S]`.
    pub fn gather_old(&self, comm: &dyn Communicator) -> Result<Tensor> {
        comm.all_gather(&self.old)
    }

    /// All ranks' EMA, `[R S]`.
    pub fn gather_ema(&self, comm: &dyn Communicator) -> Result<Tensor> {
        comm.all_gather(&self.ema)
    }

    /// The state by name, without padding: what a checkpoint holds of this rank.
    pub fn vectors(&self) -> Result<BTreeMap<String, Vec<f32>>> {
        let len = self.range().len();
        let tensors =
            [self.adamw.part(0)?, self.adamw.part(1)?, self.adamw.part(2)?, self.old.clone(), self.ema.clone()];
        let pairs = VECTORS.iter().zip(tensors);
        pairs.map(|(name, t)| Ok((name.to_string(), t.narrow(0, 0, len)?.to_vec1::<f32>()?))).collect()
    }

    /// Takes the state of a checkpoint, this rank's range of it.
    pub fn restore(&mut self, mut vectors: BTreeMap<String, Vec<f32>>, update: u64) -> Result<()> {
        let (len, padded) = (self.range().len(), self.shard_len());
        let mut take = |name: &str| -> Result<Vec<f32>> {
            let mut v = vectors
                .remove(name)
                .ok_or_else(|| Error::Failed(format!("the checkpoint has no vector named {name}")))?;
            if v.len() != len {
                return Err(Error::Failed(format!("the checkpoint's {name} has {} elements, not {len}", v.len())));
            }
            v.resize(padded, 0.0);
            Ok(v)
        };
        let parts = [take(VECTORS[0])?, take(VECTORS[1])?, take(VECTORS[2])?];
        let device = self.old.device().clone();
        self.old = Tensor::from_vec(take(VECTORS[3])?, padded, &device)?;
        self.ema = Tensor::from_vec(take(VECTORS[4])?, padded, &device)?;
        self.adamw = AdamW::restore(parts, &device)?;
        self.update = update;
        Ok(())
    }
}
