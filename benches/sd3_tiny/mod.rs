//! A small Stable Diffusion 3.5 (`tests/fixtures/sd3_tiny`: 6 layers, 384 wide, 34 M parameters) in training: 256 image and 32
//! text tokens, batch 8, f32.
#![allow(dead_code)] // not every program uses all of this

use candle_core::{Device, Tensor, Var};
use flowrl_dist::Result;
use flowrl_dist::comm::World;
use flowrl_dist::engine::{Checkpointing, Tape};
use flowrl_dist::flow::interpolate;
use flowrl_dist::model::Model;
use flowrl_dist::model::mmdit::{self, Config};
use flowrl_dist::objective::{DiffusionNftConfig, MethodSpec, Objective, Point, Requirements, Target};
use flowrl_dist::ops;
use flowrl_dist::optim::{OptimConfig, Sharded};
use flowrl_dist::params::{Layout, LoraConfig, ParamSet, Trainable};
use flowrl_dist::policy::Policies;
use flowrl_dist::rng::{Purpose, Stream};
use flowrl_dist::shard::{Gradients, Reduction, Sharding};
use flowrl_dist::train::step::{self, Conditioning, Velocities};
use std::path::Path;

pub const BATCH: usize = 8;
const SIDE: usize = 32;
const TEXT: usize = 32;

fn normals(id: u64, shape: &[usize]) -> Result<Tensor> {
    let values = Stream::new(1, Purpose::Pretrain, [id, 0, 0, 0]).normals(shape.iter().product());
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Model, optimizer's state, policies and one micro-batch of training points.
pub struct Training {
    pub world: World,
    pub model: Model,
    pub layout: Layout,
    pub state: Sharded,
    pub policies: Policies,
    pub point: Point,
    pub conditioning: [Tensor; 2],
}

impl Training {
    /// All parameters trained, or the adapters of rank 32 of all attention layers.
    pub fn new(trainable: Trainable) -> Result<Self> {
        let world = World::solo();
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sd3_tiny/config.json");
        let config = Config::read(&file)?;
        let x0 = normals(0, &[BATCH, config.in_channels, SIDE, SIDE])?;
        let eps = normals(1, x0.dims())?;
        let text = normals(2, &[BATCH, TEXT, config.joint_attention_dim])?;
        let conditioning = [text, normals(3, &[BATCH, config.pooled_projection_dim])?];
        let t = Tensor::full(0.5f32, BATCH, &Device::Cpu)?;
        let advantage = t.clone();
        let point = Point { x_t: interpolate(&x0, &eps, &t)?, t, advantage, target: Target::Forward { x0, eps } };
        let targets = mmdit::LORA_TARGETS.iter().map(|target| target.to_string()).collect();
        let lora = (trainable == Trainable::Lora).then_some(LoraConfig { rank: 32, alpha: 64.0, targets });
        let model = mmdit::model(&config, (SIDE, SIDE), lora.as_ref())?;
        let specs = model.specs();
        let layout = Layout::new(&specs, trainable);
        let base = ParamSet::init(&specs, 1, &Device::Cpu)?;
        let state = Sharded::new(&base, &layout, Sharding::Optimizer, &*world.device)?;
        let policies = Policies::new(&base, &specs, trainable, &state, false, &world)?;
        Ok(Self { world, model, layout, state, policies, point, conditioning })
    }

    /// The velocities `[B, C, H, W]` of policy and old policy, and of the base model where it is asked for.
    pub fn forward(&self, reference: bool, checkpointing: Checkpointing) -> Result<(Velocities, Tape)> {
        let required = Requirements { old: true, reference, ..Requirements::default() };
        let conditioning = Conditioning { prompts: &self.conditioning, guidance: None };
        step::velocities(&self.model, &self.policies, required, &self.point, conditioning, checkpointing)
    }

    /// DiffusionNFT's loss, and the gradient `[S]` of its mean.
    pub fn backward(&self, objective: &dyn Objective, (velocities, tape): (Velocities, Tape)) -> Result<Tensor> {
        let mean = Tensor::full(1.0 / BATCH as f32, BATCH, &Device::Cpu)?;
        let (_, dv) = step::differentiate(objective, &self.point, &velocities, &mean)?;
        let partition = self.state.partition();
        let gradients = Gradients::zeros(&self.layout, partition, &Device::Cpu)?;
        let mut reduction = Reduction::new(gradients, partition, &*self.world.device);
        step::accumulate(&self.model, &*self.policies.policy, tape, &dv, &mut reduction, true)?;
        reduction.finish()
    }

    /// Clipping, AdamW and the policy's new parameters.
    pub fn step(&mut self, gradient: &Tensor) -> Result<()> {
        self.state.step(gradient, &OptimConfig::default(), 1e-6, &*self.world.device)?;
        self.policies.refresh_policy(&self.state)
    }

    /// What a stage gets: the outputs of those before it.
    pub fn inputs_of(&self, stage: usize) -> Result<Vec<Tensor>> {
        let Point { x_t, t, .. } = &self.point;
        let mut inputs: Vec<Tensor> = [x_t, t].into_iter().chain(&self.conditioning).cloned().collect();
        for before in 0..stage {
            inputs = self.stage(before, &inputs)?;
        }
        Ok(inputs)
    }

    /// A stage's outputs.
    pub fn stage(&self, stage: usize, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.model.stages[stage].forward(&self.policies.policy.begin(stage)?.values()?, inputs)
    }

    /// A stage forward and back, to its trained parameters and its inputs.
    pub fn stage_and_back(&self, stage: usize, inputs: &[Tensor]) -> Result<()> {
        let leaf = |input: &Tensor| Ok(Var::from_tensor(input)?.into_inner());
        let leaves = inputs.iter().map(leaf).collect::<Result<Vec<_>>>()?;
        let outputs = self.model.stages[stage].forward(&self.policies.policy.begin(stage)?.leaves()?, &leaves)?;
        let mut root: Option<Tensor> = None;
        for (output, gradient) in outputs.iter().zip(inputs) {
            let seeded = ops::seed(output, gradient)?;
            root = Some(root.map_or(Ok(seeded.clone()), |root| root + seeded)?);
        }
        root.map_or(Ok(()), |root| Ok(root.backward().map(drop)?))
    }
}

/// DiffusionNFT, with so much weight on the distance from the base model.
pub fn objective(kl_coef: f64) -> Box<dyn Objective> {
    let method = DiffusionNftConfig { kl_coef, ..Default::default() };
    method.objective(&method.map())
}
