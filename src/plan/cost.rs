//! What a rank holds and sends, counted from the parameters' layouts.

use crate::config::RunConfig;
use crate::model::Model;
use crate::params::{Layout, Trainable};
use crate::shard::{Partition, Sharding};
use candle_core::DType;
use serde::Serialize;
use std::iter::Sum;
use std::ops::{Add, Mul};

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
    /// How much of it, and in how many calls.
    #[serde(flatten)]
    pub traffic: Traffic,
}

/// What a rank sends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Bytes, by the ring algorithm.
    pub bytes: usize,
    /// Collectives, each of which costs the network's latency.
    pub calls: usize,
}

impl Add for Traffic {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, calls: self.calls + other.calls }
    }
}

impl Mul<Traffic> for usize {
    type Output = Traffic;
    fn mul(self, traffic: Traffic) -> Traffic {
        Traffic { bytes: self * traffic.bytes, calls: self * traffic.calls }
    }
}

impl Sum for Traffic {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

/// Bytes of master parameters, moments, gradients and slow copies, an element.
const F32: usize = 4;

/// Parameters in R parts.
struct Vector {
    partition: Partition,
    /// Bytes of an element where it is used and on its way there.
    width: usize,
}

impl Vector {
    fn new(layout: &Layout, dtype: DType, ranks: usize) -> Self {
        Self { partition: Partition::new(layout, ranks), width: dtype.size_in_bytes() }
    }

    /// Bytes of one part of a stage.
    fn part(&self, stage: usize) -> usize {
        self.width * part(&self.partition, stage)
    }

    /// Bytes of one part of all stages.
    fn shard(&self) -> usize {
        self.width * self.partition.shard_len()
    }

    /// Bytes of the whole.
    fn total(&self) -> usize {
        self.width * self.partition.total()
    }
}

/// The parameters of a model on R ranks.
pub(super) struct Cost<'a> {
    config: &'a RunConfig,
    ranks: usize,
    stages: usize,
    /// The first stage with a trained parameter: gradients go back as far as there.
    first: usize,
    /// The optimizer's state, as this run cuts it.
    state: Partition,
    trained: Vector,
    frozen: Vector,
    /// Whether the objective needs the old policy's velocities.
    old: bool,
    /// Whether it needs the base model's, with trained parameters of its own.
    reference: bool,
}

impl<'a> Cost<'a> {
    pub fn new(config: &'a RunConfig, model: &Model, ranks: usize) -> Self {
        let (specs, trainable) = (model.specs(), config.model.trainable);
        let layout = Layout::new(&specs, trainable);
        let (needs, dtype) = (config.objective().requirements(), config.model.dtype.dtype());
        Self {
            config,
            ranks,
            stages: specs.len(),
            first: layout.entries.first().map_or(specs.len(), |entry| entry.stage),
            state: Partition::new(&layout, config.parallel.shard.parts(ranks)),
            trained: Vector::new(&layout, trainable.role().dtype(dtype), ranks),
            frozen: Vector::new(&Layout::frozen(&specs, trainable), dtype, ranks),
            old: needs.old,
            reference: needs.reference && trainable == Trainable::Full,
        }
    }

    /// What a rank holds beside activations, in the order of the ways of sharing: weights, state, gradients.
    pub fn memory(&self) -> Vec<Item> {
        let item = |name, bytes| Item { name, bytes };
        let shard = self.state.shard_len();
        let mut items = match self.config.parallel.shard {
            Sharding::None | Sharding::Optimizer => vec![
                item("base weights", self.frozen.total() + self.trained.total()),
                item("policy", self.trained.total()),
                item("old policy", self.trained.total()),
            ],
            Sharding::Full => {
                let own = if self.config.model.trainable == Trainable::Full { self.trained.shard() } else { 0 };
                vec![
                    item("base weights, this rank's parts", self.frozen.shard() + own),
                    item("gathered stages, at most", self.gathered()),
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

    /// Bytes of the stages that are here at once: the one that runs and the next one, in the forward pass for every set,
    /// in the backward pass for the policy, whose trained parameters are copied to be leaves; and those that keep their
    /// graph and with it their parameters.
    fn gathered(&self) -> usize {
        let kept = (self.first..self.stages)
            .filter(|&stage| !self.runs_again(stage))
            .map(|stage| self.whole(stage, 1))
            .sum::<usize>();
        let updates = 0..self.config.batch.updates_per_iteration;
        let sets = 1 + updates.map(|update| self.others(update)).max().unwrap_or(0);
        let pair = |stage: usize| {
            let two = |sets| self.whole(stage, sets) + if stage == 0 { 0 } else { self.whole(stage - 1, sets) };
            let leaves = self.trained.part(stage) * self.ranks;
            two(sets).max(two(1) + leaves)
        };
        (0..self.stages).map(pair).max().unwrap_or(0) + kept
    }

    /// Sets beside the policy that are gathered for a training point of this update of an iteration, because their trained
    /// parameters are others: old policy and base model.
    fn others(&self, update: usize) -> usize {
        usize::from(self.old && self.config.old_policy_lags(update)) + usize::from(self.reference)
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

    /// Bytes of a whole stage, with padding, the trained parameters for each set.
    fn whole(&self, stage: usize, sets: usize) -> usize {
        self.ranks * (self.frozen.part(stage) + sets * self.trained.part(stage))
    }

    /// A gather of these stages of a vector: one call for each that has elements.
    fn gather(&self, vector: &Vector, stages: impl Iterator<Item = usize>) -> Traffic {
        self.each(&vector.partition, stages, (self.ranks - 1) * vector.width)
    }

    /// A call for each of these stages that has elements, which sends so many bytes for each element of a part.
    fn each(&self, partition: &Partition, stages: impl Iterator<Item = usize>, width: usize) -> Traffic {
        let parts = stages.map(|stage| part(partition, stage)).filter(|&part| part > 0 && self.ranks > 1);
        parts.map(|part| Traffic { bytes: part * width, calls: 1 }).sum()
    }

    /// To bring all trained parameters here, where only they are shared out.
    pub fn gather_set(&self) -> Traffic {
        match self.config.parallel.shard {
            Sharding::Optimizer => self.gather(&self.trained, 0..self.stages),
            Sharding::None | Sharding::Full => Traffic::default(),
        }
    }

    /// For running the model once, nothing kept.
    pub fn velocity(&self) -> Traffic {
        match self.config.parallel.shard {
            Sharding::None | Sharding::Optimizer => Traffic::default(),
            Sharding::Full => self.gather(&self.frozen, 0..self.stages) + self.gather(&self.trained, 0..self.stages),
        }
    }

    /// For the training of one micro-batch of an update: forward with the sets that the objective needs, backward with the policy.
    fn training(&self, update: usize) -> Traffic {
        if self.config.parallel.shard != Sharding::Full {
            return Traffic::default();
        }
        let again = || (self.first..self.stages).filter(|&stage| self.runs_again(stage));
        self.velocity()
            + self.others(update) * self.gather(&self.trained, 0..self.stages)
            + self.gather(&self.frozen, again())
            + self.gather(&self.trained, again())
    }

    /// What is sent for this update of an iteration, of so many micro-batches: weights for its passes, gradients, each stage once, and their
    /// norm, and the new parameters.
    pub fn update(&self, update: usize, micro_batches: usize) -> Vec<Sent> {
        let sent = |collective, what, traffic| Sent { collective, what, traffic };
        let gradients = |width| self.each(&self.trained.partition, 0..self.stages, (self.ranks - 1) * width);
        let scattered = sent("reduce-scatter", "gradients", gradients(F32));
        let norm = Traffic { bytes: 2 * (self.ranks - 1) * size_of::<f64>(), calls: usize::from(self.ranks > 1) };
        let norm = sent("all-reduce", "the gradients' norm", norm);
        match self.config.parallel.shard {
            Sharding::None => vec![sent("all-reduce", "gradients", gradients(2 * F32))],
            Sharding::Optimizer => vec![scattered, norm, sent("all-gather", "new parameters", self.gather_set())],
            Sharding::Full => {
                let weights = micro_batches * self.training(update);
                vec![sent("all-gather", "weights, forward and backward", weights), scattered, norm]
            }
        }
    }

    /// Bytes of one all-reduce of all gradients.
    pub fn all_reduce(&self) -> usize {
        2 * (self.ranks - 1) * self.trained.partition.shard_len() * F32
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
