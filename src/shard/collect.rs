//! Shards to whole vectors, and whole vectors to shards of their sum: stage by stage.

use super::{Gradients, Partition};
use crate::comm::{Call, Communicator, Pending, ReduceOp};
use crate::error::Result;
use candle_core::Tensor;

/// The flat vector `[total]` of all ranks' shards `[S]`.
pub fn gather(partition: &Partition, shard: &Tensor, comm: &dyn Communicator) -> Result<Tensor> {
    if partition.parts() < comm.world_size() {
        return Ok(shard.force_contiguous()?); // every rank holds all of it
    }
    let mut begun = Vec::with_capacity(partition.stages());
    for stage in 0..partition.stages() {
        let range = partition.in_shard(stage);
        if !range.is_empty() {
            begun.push((stage, comm.begin(Call::AllGather, &shard.narrow(0, range.start, range.len())?)?));
        }
    }
    let whole = |(stage, pending): (usize, Pending)| Ok(pending.wait()?.narrow(0, 0, partition.flat(stage).len())?);
    let stages = begun.into_iter().map(whole).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&stages, 0)?)
}

/// The gradients of an update on their way to the ranks that hold their parameters: a stage is reduced as soon as its
/// gradients are final, while the backward pass goes on with the stage before.
pub struct Reduction<'a> {
    partition: &'a Partition,
    comm: &'a dyn Communicator,
    gradients: Gradients,
    /// From the last stage on.
    begun: Vec<Option<Pending>>,
}

impl<'a> Reduction<'a> {
    /// For gradients that are summed here and then over the ranks.
    pub fn new(gradients: Gradients, partition: &'a Partition, comm: &'a dyn Communicator) -> Self {
        Self { partition, comm, gradients, begun: Vec::new() }
    }

    /// Adds gradients of a stage's parameters, by slot.
    pub fn add(&mut self, stage: usize, gradients: Vec<(usize, Tensor)>) -> Result<()> {
        self.gradients.add(stage, gradients)
    }

    /// Begins to reduce a stage to which nothing will be added, and the stages after it. The order of the collectives is
    /// from the last stage to the first on every rank, whatever each has to add.
    pub fn begin(&mut self, stage: usize) -> Result<()> {
        if self.comm.world_size() == 1 {
            return Ok(()); // the sum here is the sum of all
        }
        while self.begun.len() + stage < self.partition.stages() {
            let next = self.partition.stages() - 1 - self.begun.len();
            let range = self.partition.padded(next);
            let call = match self.partition.parts() < self.comm.world_size() {
                true => Call::AllReduce(ReduceOp::Sum),
                false => Call::ReduceScatter(ReduceOp::Sum),
            };
            let sum = self.gradients.sum().narrow(0, range.start, range.len())?;
            self.begun.push((!range.is_empty()).then(|| self.comm.begin(call, &sum)).transpose()?);
        }
        Ok(())
    }

    /// This rank's shard `[S]` of the sum over ranks; reduces what was not begun.
    ///
    /// # Errors
    /// A trainable parameter got no gradient, though this rank ran a backward pass.
    pub fn finish(mut self) -> Result<Tensor> {
        self.gradients.check()?;
        if self.comm.world_size() == 1 {
            return Ok(self.gradients.sum().clone());
        }
        self.begin(0)?;
        let Self { begun, gradients, .. } = self;
        let mut stages = begun.into_iter().flatten().map(Pending::wait).collect::<Result<Vec<_>>>()?;
        drop(gradients); // before the shard is put together
        stages.reverse();
        Ok(Tensor::cat(&stages, 0)?)
    }
}
