//! The model that the engine is measured on, as one graph and block by block.
#![allow(dead_code)] // not every program uses all of this

use candle_core::{DType, Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::engine::{self, Checkpointing, Pass};
use flowrl_dist::model::{Model, glyphs};
use flowrl_dist::params::{Layout, LoraConfig, ParamSet, Trainable};
use flowrl_dist::rng::{Purpose, Stream};
use flowrl_dist::shard::{Gradients, Partition, Weights};

/// 12 blocks, 384 wide, 256 image tokens and 7 of the condition.
pub fn model(lora: Option<&LoraConfig>) -> Model {
    let config = glyphs::Config {
        width: 384,
        heads: 6,
        depth: 12,
        patch: 6,
        picture: (96, 96),
        characters: 5,
        alphabet: 37,
        colours: 8,
    };
    glyphs::model(&config, lora)
}

/// Samples of a micro-batch.
pub const BATCH: usize = 4;

pub struct Inputs {
    x: Tensor,
    t: Tensor,
    conditioning: Vec<Tensor>,
}

pub fn inputs() -> Result<Inputs> {
    let device = &Device::Cpu;
    let normals = Stream::new(1, Purpose::Pretrain, [0; 4]).normals(BATCH * 3 * 96 * 96);
    Ok(Inputs {
        x: Tensor::from_vec(normals, (BATCH, 3, 96, 96), device)?,
        t: Tensor::new(&[0.2f32, 0.4, 0.6, 0.8], device)?,
        conditioning: vec![
            Tensor::ones((BATCH, 5), DType::U32, device)?,
            Tensor::ones((BATCH, 2), DType::U32, device)?,
        ],
    })
}

impl Inputs {
    /// The first sample alone.
    #[allow(dead_code, reason = "not everyone who measures wants it")]
    pub fn first(&self) -> Result<Self> {
        let conditioning = self.conditioning.iter().map(|c| c.narrow(0, 0, 1)).collect::<candle_core::Result<_>>()?;
        Ok(Self { x: self.x.narrow(0, 0, 1)?, t: self.t.narrow(0, 0, 1)?, conditioning })
    }
}

/// Velocities by the policy and the others, and the policy's gradients, which `take` gets.
#[allow(dead_code, reason = "not everyone who measures wants it")]
pub fn training_pass(
    model: &Model,
    policy: &dyn Weights,
    others: &[&dyn Weights],
    inputs: &Inputs,
    take: impl FnMut(usize, Vec<(usize, Tensor)>) -> Result<()>,
) -> Result<()> {
    let pass = |weights| Pass::new(weights, &inputs.x, &inputs.t, &inputs.conditioning);
    let others = others.iter().map(|&weights| pass(weights)).collect();
    let (_, _, tape) = engine::forward_beside(model, pass(policy), others, Checkpointing::EACH)?;
    engine::backward(model, policy, tape, &inputs.x, take)
}

/// The whole model as one graph, as candle would have it.
pub fn monolithic(model: &Model, params: &ParamSet, inputs: &Inputs) -> Result<()> {
    let mut io = vec![inputs.x.clone(), inputs.t.clone()];
    io.extend(inputs.conditioning.iter().cloned());
    for (index, stage) in model.stages.iter().enumerate() {
        io = stage.forward(params.stage(index), &io)?;
    }
    let gradients = (&io[0] * &inputs.x)?.sum_all()?.backward()?;
    drop(gradients);
    Ok(())
}

pub fn block_wise(model: &Model, params: &ParamSet, layout: &Layout, inputs: &Inputs, each: usize) -> Result<()> {
    let Inputs { x, t, conditioning } = inputs;
    let (_, tape) = engine::forward(model, params, x, t, conditioning, Checkpointing(each))?;
    let mut gradients = Gradients::zeros(layout, &Partition::new(layout, 1), &Device::Cpu)?;
    engine::backward(model, params, tape, x, |stage, of_stage| gradients.add(stage, of_stage))
}

/// The model with what of it is trained, and random parameters.
pub fn trained(trainable: Trainable) -> Result<(Model, Layout, ParamSet)> {
    let lora = (trainable == Trainable::Lora).then(LoraConfig::default);
    let model = model(lora.as_ref());
    let specs = model.specs();
    let layout = Layout::new(&specs, trainable);
    let set = ParamSet::init(&specs, 1, &Device::Cpu)?;
    let params = set.with_flat(&layout, &set.flatten(&layout)?)?;
    Ok((model, layout, params))
}
