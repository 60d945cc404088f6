//! The gradients of an update: micro-batch by micro-batch, each by the steps of [`step`].

use super::Trainer;
use super::batch::{MicroBatchTensors, Rollouts};
use super::step::{self, Conditioning, Guidance, Velocities};
use crate::batching::{in_step, micro_batches};
use crate::data::Prompt;
use crate::engine::Tape;
use crate::error::Result;
use crate::objective::Point;
use crate::observe::Metrics;
use crate::shard::{Gradients, Reduction};
use candle_core::{DType, Tensor};

/// The metrics of the losses, in the order of a micro-batch's.
const LOSSES: [&str; 3] = ["loss", "loss.policy", "loss.kl"];

impl Trainer {
    /// The gradients of an update: summed here over all micro-batches and timesteps, and then over
    /// the ranks, each stage as soon as the last micro-batch is through it; and the losses.
    pub(super) fn gradients(&self, update: usize, rollouts: &Rollouts) -> Result<(Reduction<'_>, Metrics)> {
        let (model, policy) = (&self.pipeline.model, &*self.policies.policy);
        let partition = self.state.partition();
        let gradients = Gradients::zeros(&self.layout, partition, &self.pipeline.device)?;
        let mut reduction = Reduction::new(gradients, partition, &*self.world.device);

        let batch = self.batches.of_update(update, rollouts, self.world.world_size());
        let max_per_rank = in_step(policy.is_collective(), batch.max_per_rank);
        let mut parts = micro_batches(batch.own.len(), self.config.batch.micro_batch, max_per_rank);
        let mut losses = Vec::new();
        while let Some(part) = parts.next() {
            let MicroBatchTensors { point, prompts, weights } =
                self.batches.micro_batch(&self.pipeline, rollouts, &batch, part)?;
            let (velocities, tape) = self.velocities(&point, &prompts)?;
            let (of_batch, dv) = step::differentiate(&*self.objective, &point, &velocities, &weights)?;
            step::accumulate(model, policy, tape, &dv, &mut reduction, parts.len() == 0)?;
            losses.push(([of_batch.loss, of_batch.policy, of_batch.kl].map(|values| values.detach()), part.len));
        }
        // Only now: a GPU would stand still while each micro-batch's numbers are waited for and the
        // next one is prepared.
        Ok((reduction, loss_metrics(&losses)?))
    }

    /// The velocities that the objective asks for, and what the policy's backward pass needs.
    fn velocities(&self, point: &Point, prompts: &[Prompt]) -> Result<(Velocities, Tape)> {
        let required = self.objective.requirements();
        // Rollout steps are trained with the guidance that they were sampled with; samples and
        // noise know of none.
        let scale = if required.trajectory { self.config.sampler.guidance } else { 1.0 };
        let negative = (scale != 1.0).then(|| self.pipeline.negative(prompts)).transpose()?;
        let conditioning = Conditioning {
            prompts: &self.pipeline.encode(prompts)?,
            guidance: negative.as_deref().map(|negative| Guidance { negative, scale }),
        };
        let checkpointing = self.config.parallel.checkpoint_activations;
        step::velocities(&self.pipeline.model, &self.policies, required, point, conditioning, checkpointing)
    }
}

/// The means of the losses `[B]` of this rank's micro-batches, of each of which the first so many
/// samples count.
fn loss_metrics(losses: &[([Tensor; 3], usize)]) -> Result<Metrics> {
    let mut metrics = Metrics::default();
    for name in LOSSES {
        metrics.add_mean(name, 0.0, 0.0); // known on every rank, even without samples
    }
    for (all, len) in losses.iter().filter(|(_, len)| *len > 0) {
        for (name, values) in LOSSES.into_iter().zip(all) {
            let values = values.narrow(0, 0, *len)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            values.into_iter().for_each(|value| metrics.add_mean(name, value, 1.0));
        }
    }
    Ok(metrics)
}
