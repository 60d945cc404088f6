//! The optimizer's state of one rank: its shard of the flat parameters.

use super::adamw::{AdamW, Lerp, square_sum};
use super::schedule::ema_decay;
use super::{OldPolicyDecay, OptimConfig};
use crate::checkpoint::Shard;
use crate::comm::{Communicator, ReduceOp};
use crate::error::{Error, Result};
use crate::params::{Layout, Values};
use crate::shard::{Partition, Sharding, gather};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::ops::Range;

/// This rank's shard: fp32 master parameters, AdamW's moments, the old policy and the EMA, each `[S]`; or all of them on
/// every rank, where nothing is shared out.
pub struct Sharded {
    adamw: AdamW,
    old: Tensor,
    ema: Tensor,
    sharding: Sharding,
    /// Which part of which partition this rank holds.
    partition: Partition,
    part: usize,
    /// Which part this rank saves: those of all ranks are the whole, shared out or not.
    saved: Partition,
    rank: usize,
    /// Updates taken so far.
    pub update: u64,
}

/// What an update did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Global norm of the gradient before clipping.
    pub norm: f64,
}

/// Names of the vectors in a checkpoint, in AdamW's order, then the slow copies.
pub(crate) const VECTORS: [&str; 5] = ["policy", "exp_avg", "exp_avg_sq", "old", "ema"];

impl Sharded {
    /// Starts from the parameters of `layout`, the same on every rank, of which each reads its part.
    pub fn new(values: &dyn Values, layout: &Layout, sharding: Sharding, comm: &dyn Communicator) -> Result<Self> {
        let (rank, ranks) = (comm.rank(), comm.world_size());
        let partition = Partition::new(layout, sharding.parts(ranks));
        let part = rank % partition.parts();
        let mine = partition.read(values, layout, part, DType::F32)?;
        Ok(Self {
            adamw: AdamW::new(&mine)?,
            ema: mine.force_contiguous()?,
            old: mine,
            sharding,
            partition,
            part,
            saved: Partition::new(layout, ranks),
            rank,
            update: 0,
        })
    }

    /// What is shared out.
    pub fn sharding(&self) -> Sharding {
        self.sharding
    }

    /// How the parameters are shared out.
    pub fn partition(&self) -> &Partition {
        &self.partition
    }

    /// Clips the global norm of the gradient, this rank's shard `[S]` of the sum over ranks ([`crate::shard::Reduction`]),
    /// and takes one AdamW step.
    ///
    /// # Errors
    /// [`Error::NotFinite`] on every rank alike if any gradient is not finite; nothing was changed then.
    pub fn step(
        &mut self,
        gradient: &Tensor,
        config: &OptimConfig,
        lr: f64,
        comm: &dyn Communicator,
    ) -> Result<StepReport> {
        let mut square = square_sum(gradient)?;
        if self.partition.parts() > 1 {
            square = comm.all_reduce(&square, ReduceOp::Sum)?;
        }
        let norm = square.to_vec1::<f64>()?[0].sqrt();
        if !norm.is_finite() {
            return Err(Error::NotFinite(format!(
                "update {}: the gradient's norm is {norm}; the weights were left alone",
                self.update + 1
            )));
        }
        // As torch.nn.utils.clip_grad_norm_.
        let scale = (config.clip / (norm + 1e-6)).min(1.0);
        self.update += 1;
        self.adamw.step(gradient, scale, lr, self.update, config)?;
        Ok(StepReport { norm })
    }

    /// The EMA follows the master parameters: after every update.
    pub fn update_ema(&mut self, largest_decay: f64) -> Result<()> {
        Ok(self.ema.inplace_op2(&self.adamw.part(0)?, &Lerp(ema_decay(self.update, largest_decay)))?)
    }

    /// The old policy follows the master parameters: after every iteration.
    pub fn update_old(&mut self, decay: OldPolicyDecay) -> Result<f64> {
        let eta = decay.eta(self.update);
        self.old.inplace_op2(&self.adamw.part(0)?, &Lerp(eta))?;
        Ok(eta)
    }

    /// This rank's shard `[S]` of the master parameters, sharing memory with the state: updates change it.
    pub fn policy(&self) -> Result<Tensor> {
        Ok(self.adamw.part(0)?)
    }

    /// This rank's shard `[S]` of the old policy, which [`Sharded::update_old`] changes.
    pub fn old(&self) -> &Tensor {
        &self.old
    }

    /// This rank's shard `[S]` of the EMA.
    pub fn ema(&self) -> &Tensor {
        &self.ema
    }

    /// The master parameters of all ranks, `[total]`.
    pub fn gather_policy(&self, comm: &dyn Communicator) -> Result<Tensor> {
        gather(&self.partition, &self.policy()?, comm)
    }

    /// The EMA of all ranks, `[total]`.
    pub fn gather_ema(&self, comm: &dyn Communicator) -> Result<Tensor> {
        gather(&self.partition, &self.ema, comm)
    }

    /// The whole state by the vectors' names, `[total]` each. Collective.
    pub fn gather_all(&self, comm: &dyn Communicator) -> Result<Vec<(String, Tensor)>> {
        let whole = |(name, vector): (&&str, Tensor)| Ok((name.to_string(), gather(&self.partition, &vector, comm)?));
        VECTORS.iter().zip(self.vectors()?).map(whole).collect()
    }

    /// Master parameters, both moments, old policy and EMA, `[S]` each, sharing memory with the state.
    fn vectors(&self) -> Result<[Tensor; 5]> {
        Ok([self.adamw.part(0)?, self.adamw.part(1)?, self.adamw.part(2)?, self.old.clone(), self.ema.clone()])
    }

    /// The vectors `[S]` that every rank holds alike, sharing memory with the state: all where nothing is shared out, else
    /// none.
    pub fn replicated(&self) -> Result<Vec<Tensor>> {
        match self.sharding {
            Sharding::None => Ok(self.vectors()?.into()),
            Sharding::Optimizer | Sharding::Full => Ok(Vec::new()),
        }
    }

    /// Digest of [`Sharded::replicated`].
    pub fn digest(&self) -> Result<String> {
        const PIECE: usize = 1 << 22; // elements that are copied at once
        let mut hasher = blake3::Hasher::new();
        for vector in self.replicated()? {
            let len = vector.elem_count();
            for start in (0..len).step_by(PIECE) {
                // Without a copy of its own the whole of what it is a view of would come from a GPU.
                let piece = vector.narrow(0, start, PIECE.min(len - start))?.force_contiguous()?;
                let values = piece.to_vec1::<f32>()?;
                hasher.update(bytemuck::cast_slice(&values));
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// What this rank saves: its ranges of the flat vector, and the state by name over them, without padding.
    pub fn snapshot(&self) -> Result<Shard> {
        let own = |vector: Tensor| match self.partition == self.saved {
            true => self.saved.strip(&vector, self.rank),
            false => self.saved.strip(&self.saved.cut(&vector, self.rank)?, self.rank),
        };
        let pairs = VECTORS.iter().zip(self.vectors()?).map(|(name, vector)| Ok((name.to_string(), own(vector)?)));
        Ok(Shard { ranges: self.saved.owned(self.rank), vectors: pairs.collect::<Result<_>>()? })
    }

    /// The ranges of the flat vector that this rank holds.
    pub fn held(&self) -> Vec<Range<usize>> {
        self.partition.owned(self.part)
    }

    /// Takes the state of a checkpoint over the ranges that this rank holds.
    pub fn restore(&mut self, mut vectors: BTreeMap<String, Vec<f32>>, update: u64) -> Result<()> {
        let len: usize = self.held().iter().map(Range::len).sum();
        let device = self.old.device().clone();
        let mut take = |name: &str| -> Result<Tensor> {
            let v = vectors
                .remove(name)
                .ok_or_else(|| Error::Failed(format!("the checkpoint has no vector named {name}")))?;
            if v.len() != len {
                return Err(Error::Failed(format!("the checkpoint's {name} has {} elements, not {len}", v.len())));
            }
            self.partition.fill(&v, self.part, &device)
        };
        let parts = [take(VECTORS[0])?, take(VECTORS[1])?, take(VECTORS[2])?];
        (self.old, self.ema) = (take(VECTORS[3])?, take(VECTORS[4])?);
        self.adamw = AdamW::restore(&parts)?;
        self.update = update;
        Ok(())
    }
}
