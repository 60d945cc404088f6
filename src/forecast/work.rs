//! What a rank and a node do in an iteration, whatever the machine.

use crate::config::RunConfig;
use crate::error::Result;
use crate::flow::Solver;
use crate::params::Trainable;
use crate::plan::Plan;
use serde::Serialize;
use std::fmt;

/// Work of the busiest rank in one iteration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Work {
    /// Floating-point operations of the rollout.
    pub sample: f64,
    /// Floating-point operations of the training passes.
    pub train: f64,
    /// Images.
    pub images: f64,
    /// Bytes that a rank sends.
    pub sent: f64,
    /// Collectives that carry parameters or gradients.
    pub calls: f64,
    /// Bytes of optimizer state that are read and written.
    pub optimizer: f64,
}

/// What nodes send in an iteration, their ranks one after another in the ring.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Links {
    /// How many there are.
    pub nodes: usize,
    /// Bytes from rank to rank of one node.
    pub inside: f64,
    /// Bytes that a node sends to the next one.
    pub between: f64,
}

impl Work {
    /// Of `plan`, which is of `config`.
    ///
    /// # Errors
    /// What is wrong with the files that give the model's sizes.
    pub fn new(config: &RunConfig, plan: &Plan) -> Result<Self> {
        let forward = config.model.flops()? + adapters(config, plan)?;
        let padded = |count: usize| (count.div_ceil(plan.micro_batch) * plan.micro_batch) as f64;
        let guided = |guidance: f64| if guidance == 1.0 { 1.0 } else { 2.0 };
        let images = plan.images_per_rank.1;
        let sample = padded(images) * plan.solver_steps as f64 * guided(config.sampler.guidance) * forward;
        let points = plan.points.iter().map(|points| padded(points * images / plan.images));
        let train = points.enumerate().map(|(update, points)| points * passes(config, plan, update) * forward).sum();
        let (updates, sent) = (plan.updates_per_iteration as f64, plan.iteration_sent());
        Ok(Self {
            sample,
            train,
            images: images as f64,
            sent: sent.bytes as f64,
            calls: sent.calls as f64,
            // Master, two moments, gradient and EMA each update; master and old policy each iteration.
            optimizer: 4.0 * plan.shard as f64 * (8.0 * updates + 3.0),
        })
    }
}

impl Links {
    /// Of a run of `ranks` ranks, each of which sends `sent` bytes, with `per_node` on a node.
    pub fn new(sent: f64, ranks: usize, per_node: usize) -> Self {
        let (nodes, on_node) = (ranks.div_ceil(per_node), per_node.min(ranks));
        match nodes {
            1 => Self { nodes, inside: on_node as f64 * sent, between: 0.0 },
            _ => Self { nodes, inside: (on_node - 1) as f64 * sent, between: sent },
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sample, train) = (self.sample / 1e12, self.train / 1e12);
        let value = format!("{sample:.3} TFLOP to sample, {train:.3} TFLOP to train, an iteration");
        writeln!(f, "{:>24}  {value}", "work a rank, at most")
    }
}

impl fmt::Display for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        let (inside, between) = (mib(self.inside), mib(self.between));
        let value = format!("{inside:.1} MiB between its ranks, {between:.1} MiB to the next node, an iteration");
        writeln!(f, "{:>24}  {value}", format!("sent by each of {} nodes", self.nodes))
    }
}

/// Floating-point operations of the adapters in a forward pass for one sample.
fn adapters(config: &RunConfig, plan: &Plan) -> Result<f64> {
    Ok(match config.model.trainable {
        Trainable::Full => 0.0,
        Trainable::Lora => 2.0 * (plan.trainable * config.model.tokens()?) as f64,
    })
}

/// Of a block's forward pass, about what is not done again where only adapters are trained: its last layer, 4 of 12 squares
/// of the width, or of 16 with a second attention, beside the products of the attention ([`ops::Wanted`]).
///
/// [`ops::Wanted`]: crate::ops::Wanted
const LAST_LAYER: f64 = 0.25;

/// Forward passes' worth of work at one training point of this update of an iteration.
fn passes(config: &RunConfig, plan: &Plan, update: usize) -> f64 {
    let needs = config.objective().requirements();
    let (backward, again) = match config.model.trainable {
        Trainable::Full => (2.0, 1.0), // gradients of activations and of weights
        Trainable::Lora => (1.0, 1.0 - LAST_LAYER),
    };
    let again = again * plan.blocks_again;
    let old = if needs.old && config.old_policy_lags(update) { 1.0 } else { 0.0 };
    let reference = if needs.reference { 1.0 } else { 0.0 };
    let lanes = 1.0 + old + reference;
    // Rollout steps are trained with the guidance that they were sampled with.
    let guided = config.sampler.solver == Solver::Sde && needs.trajectory && config.sampler.guidance != 1.0;
    lanes * if guided { 2.0 } else { 1.0 } + again + backward
}
