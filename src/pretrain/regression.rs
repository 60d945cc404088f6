//! Rectified-flow regression of all parameters of a model.

use crate::comm::Communicator;
use crate::engine::{self, Checkpointing};
use crate::error::Result;
use crate::flow::interpolate;
use crate::model::Model;
use crate::optim::{OptimConfig, Sharded, StepReport};
use crate::params::{Layout, ParamSet, Trainable, Values as _};
use crate::pipeline::Pipeline;
use crate::shard::{Gradients, Reduction, Sharding};
use crate::train::step;
use candle_core::Tensor;

/// A micro-batch of training examples.
pub struct Examples {
    /// Data `[B, C, H, W]`.
    pub x0: Tensor,
    /// Noise `[B, C, H, W]`.
    pub eps: Tensor,
    /// Times `[B]`.
    pub t: Tensor,
    /// What the model is told, each `[B, ...]`.
    pub conditioning: Vec<Tensor>,
    /// Examples that count; those after them are padding.
    pub count: usize,
}

/// A model whose parameters are all trained by rectified-flow regression.
pub struct Regression<'a> {
    model: &'a Model,
    pub(super) layout: Layout,
    pub(super) state: Sharded,
    /// The parameters after the last step.
    pub(super) params: ParamSet,
}

impl<'a> Regression<'a> {
    /// Starts from the pipeline's base weights.
    pub fn new(pipeline: &'a Pipeline, sharding: Sharding, comm: &dyn Communicator) -> Result<Self> {
        let layout = Layout::new(&pipeline.model.specs(), Trainable::Full);
        let state = Sharded::new(&*pipeline.base, &layout, sharding, comm)?;
        let params = pipeline.params()?.with_flat(&layout, &state.gather_policy(comm)?)?;
        Ok(Self { model: &pipeline.model, layout, state, params })
    }

    /// The parameters after the last step.
    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// One AdamW step on the mean loss over `global` examples, of which `batches` are this rank's. Returns the sum of these
    /// examples' losses, each a mean over dimensions. Collective.
    ///
    /// # Errors
    /// [`crate::Error::NotFinite`], and what making an example fails with.
    pub fn step(
        &mut self,
        batches: impl IntoIterator<Item = Result<Examples>>,
        global: usize,
        config: &OptimConfig,
        lr: f64,
        comm: &dyn Communicator,
    ) -> Result<(f64, StepReport)> {
        let partition = self.state.partition();
        let gradients = Gradients::zeros(&self.layout, partition, &self.params.device())?;
        let mut reduction = Reduction::new(gradients, partition, comm);
        let mut loss = 0.0;
        for examples in batches {
            loss += self.accumulate(&examples?, global, &mut reduction)?;
        }
        let gradient = reduction.finish()?; // [S]; collective
        let report = self.state.step(&gradient, config, lr, comm)?;
        self.refresh(comm)?;
        Ok((loss, report))
    }

    /// Takes the parameters from the optimizer's state. Collective.
    pub(super) fn refresh(&mut self, comm: &dyn Communicator) -> Result<()> {
        self.params = self.params.with_flat(&self.layout, &self.state.gather_policy(comm)?)?;
        Ok(())
    }

    /// Adds the gradient of the mean loss over `global` examples; returns the sum of these examples' losses.
    fn accumulate(&self, examples: &Examples, global: usize, reduction: &mut Reduction) -> Result<f64> {
        let Examples { x0, eps, t, conditioning, count } = examples;
        let x_t = interpolate(x0, eps, t)?;
        let (v, tape) = engine::forward(self.model, &self.params, &x_t, t, conditioning, Checkpointing(0))?;
        let difference = (v - (eps - x0)?)?; // [B, C, H, W]
        // The padding at the end counts for nothing.
        let size = x0.dim(0)?;
        let weights: Vec<f32> = (0..size).map(|i| if i < *count { 1.0 } else { 0.0 }).collect();
        let weights = Tensor::from_vec(weights, (size, 1, 1, 1), x0.device())?;
        let difference = difference.broadcast_mul(&weights)?;
        let dims = (x0.elem_count() / size) as f64;
        let dv = (&difference * (2.0 / (dims * global as f64)))?;
        let last = false; // of how many there are nobody says: the sum goes over the ranks when all are done
        step::accumulate(self.model, &self.params, tape, &dv, reduction, last)?;
        Ok(f64::from(difference.sqr()?.sum_all()?.to_scalar::<f32>()?) / dims)
    }
}
