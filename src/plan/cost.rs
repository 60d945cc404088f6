//! What a rank holds and sends, counted from the parameters' layouts.

use crate::config::RunConfig;
use crate::model::Model;
use crate::objective::Objective;
use crate::params::{Layout, Trainable};
use crate::shard::{Partition, Sharding};
use serde::Serialize;

/// Memory of one kind on each rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Item {
    /// What it is.
    pub name: &'static str,
    /// How much of it.
    pub bytes: usize,
}

/// What each rank sends in collectives of one kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sent {
    /// The collective.
    pub collective: &'static str,
    /// What goes through it.
    pub what: &'static str,
    /// How much of it, by the ring algorithm.
    pub bytes: usize,
}

/// Bytes of master parameters, moments, gradients and slow copies, an element.
const F32: usize = 4;

/// The parameters of a model on R ranks.
pub(super) struct Cost<'a> {
    config: &'a RunConfig,
    ranks: usize,
    stages: usize,
    /// The first stage with a trained parameter: gradients go back as far as there.
    first: usize,
    /// Bytes of a weight.
    width: usize,
    /// The optimizer's state, as this run cuts it.
    state: Partition,
    /// The trained parameters and the others in R parts.
    trained: Partition,
    frozen: Partition,
    /// Sets that differ in their trained parameters and are gathered for a training point: policy, old, base model.
    old: bool,
    reference: bool,
}

impl<'a> Cost<'a> {
    pub fn new(config: &'a RunConfig, model: &Model, ranks: usize) -> Self {
        let (specs, trainable) = (model.specs(), config.model.trainable);
        let layout = Layout::new(&specs, trainable);
        let needs = Objective::new(&config.method, &config.advantage.resolve(&config.method)).needs();
        Self {
            config,
            ranks,
            stages: specs.len(),
            first: layout.entries.first().map_or(specs.len(), |entry| entry.stage),
            width: config.model.dtype.dtype().size_in_bytes(),
            state: Partition::new(&layout, config.parallel.shard.parts(ranks)),
            trained: Partition::new(&layout, ranks),
            frozen: Partition::new(&Layout::frozen(&specs, trainable), ranks),
            old: needs.old,
            reference: needs.reference && trainable == Trainable::Full,
        }
    }

    /// What a rank holds beside activations, in the order of the ways of sharing: weights, state, gradients.
    pub fn memory(&self) -> Vec<Item> {
        let weights = |elements: usize| elements * self.width;
        let item = |name, bytes| Item { name, bytes };
        let shard = self.state.shard_len();
        let mut items = match self.config.parallel.shard {
            Sharding::None | Sharding::Optimizer => vec![
                item("base weights", weights(self.frozen.total() + self.trained.total())),
                item("policy", weights(self.trained.total())),
                item("old policy", weights(self.trained.total())),
            ],
            Sharding::Full => {
                let own = if self.config.model.trainable == Trainable::Full { self.trained.shard_len() } else { 0 };
                vec![
                    item("base weights, this rank's parts", weights(self.frozen.shard_len() + own)),
                    item("gathered stages, at most", weights(self.gathered())),
                ]
            }
        };
        items.extend([
            item("master parameters", F32 * shard),
            item("moments", F32 * 2 * shard),
            item("old policy and EMA, f32", F32 * 2 * shard),
            item("sum of gradients", F32 * self.state.padded_len()),
        ]);
        items
    }

    /// Elements of the stages that are here at once: the one that runs and the next one, in the forward pass for every set,
    /// in the backward pass for the policy, whose trained parameters are copied to be leaves; and those that keep their
    /// graph and with it their parameters.
    fn gathered(&self) -> usize {
        let kept = (self.first..self.stages)
            .filter(|&stage| !self.runs_again(stage))
            .map(|stage| self.whole(stage, 1))
            .sum::<usize>();
        let sets = 1 + usize::from(self.old) + usize::from(self.reference);
        let pair = |stage: usize| {
            let two = |sets| self.whole(stage, sets) + if stage == 0 { 0 } else { self.whole(stage - 1, sets) };
            let leaves = part(&self.trained, stage) * self.ranks;
            two(sets).max(two(1) + leaves)
        };
        (0..self.stages).map(pair).max().unwrap_or(0) + kept
    }

    /// Whether a stage that gradients reach is run again in the backward pass.
    fn runs_again(&self, stage: usize) -> bool {
        self.config.parallel.checkpoint_activations.of(stage, self.stages)
    }

    /// Share of the blocks, which lie between stem and head, that the backward pass runs again.
    pub fn blocks_again(&self) -> f64 {
        let blocks = self.stages.saturating_sub(2).max(1);
        let again = (self.first.max(1)..=blocks).filter(|&stage| self.runs_again(stage)).count();
        again as f64 / blocks as f64
    }

    /// Elements of a whole stage, with padding, the trained ones for each set.
    fn whole(&self, stage: usize, sets: usize) -> usize {
        self.ranks * (part(&self.frozen, stage) + sets * part(&self.trained, stage))
    }

    /// Bytes that a rank sends to gather parts of these elements in the model's type.
    fn gather(&self, part: usize) -> usize {
        (self.ranks - 1) * part * self.width
    }

    /// Bytes that a rank sends to bring all trained parameters here, where only they are shared out.
    pub fn gather_set(&self) -> usize {
        match self.config.parallel.shard {
            Sharding::Optimizer => self.gather(self.trained.shard_len()),
            Sharding::None | Sharding::Full => 0,
        }
    }

    /// Bytes for running the model once, nothing kept.
    pub fn velocity(&self) -> usize {
        match self.config.parallel.shard {
            Sharding::None | Sharding::Optimizer => 0,
            Sharding::Full => self.gather(self.frozen.shard_len() + self.trained.shard_len()),
        }
    }

    /// Bytes for the old policy's velocities beside the policy's.
    pub fn old_velocity(&self) -> usize {
        match self.config.parallel.shard {
            Sharding::Full if self.old => self.gather(self.trained.shard_len()),
            _ => 0,
        }
    }

    /// Bytes for the training of one micro-batch: forward with the sets that the objective needs, backward with the policy.
    fn training(&self) -> usize {
        if self.config.parallel.shard != Sharding::Full {
            return 0;
        }
        let again = (self.first..self.stages).filter(|&stage| self.runs_again(stage));
        let again = again.map(|stage| part(&self.frozen, stage) + part(&self.trained, stage)).sum();
        let reference = if self.reference { self.trained.shard_len() } else { 0 };
        self.velocity() + self.old_velocity() + self.gather(reference) + self.gather(again)
    }

    /// What is sent for an update of so many micro-batches: weights for its passes, gradients, each stage once, and their
    /// norm, and the new parameters.
    pub fn update(&self, micro_batches: usize) -> Vec<Sent> {
        let sent = |collective, what, bytes| Sent { collective, what, bytes };
        let once = (self.ranks - 1) * self.trained.shard_len() * F32;
        let scattered = sent("reduce-scatter", "gradients", once);
        let norm = sent("all-reduce", "the gradients' norm", 2 * (self.ranks - 1) * size_of::<f64>());
        match self.config.parallel.shard {
            Sharding::None => vec![sent("all-reduce", "gradients", 2 * once)],
            Sharding::Optimizer => vec![scattered, norm, sent("all-gather", "new parameters", self.gather_set())],
            Sharding::Full => {
                let weights = micro_batches * self.training();
                vec![sent("all-gather", "weights, forward and backward", weights), scattered, norm]
            }
        }
    }

    /// Bytes of one all-reduce of all gradients.
    pub fn all_reduce(&self) -> usize {
        2 * (self.ranks - 1) * self.trained.shard_len() * F32
    }

    /// S.
    pub fn shard(&self) -> usize {
        self.state.shard_len()
    }
}

/// Elements of a part of a stage.
fn part(partition: &Partition, stage: usize) -> usize {
    if stage < partition.stages() { partition.in_shard(stage).len() } else { 0 }
}
