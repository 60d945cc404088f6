//! The model that the engine is measured on, as one graph and block by block.
#![allow(dead_code)] // not every program uses all of this

mod composed;

use candle_core::backprop::GradStore;
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
    fn all(&self) -> Vec<Tensor> {
        [&self.x, &self.t].into_iter().chain(&self.conditioning).cloned().collect()
    }

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

/// The gradients by the whole model as one graph, as candle would have it.
pub fn monolithic(model: &Model, params: &ParamSet, inputs: &Inputs) -> Result<GradStore> {
    let mut io = inputs.all();
    for (index, stage) in model.stages.iter().enumerate() {
        io = stage.forward(params.stage(index), &io)?;
    }
    Ok((&io[0] * &inputs.x)?.sum_all()?.backward()?)
}

/// The same by candle's own operations.
pub fn composed(model: &Model, params: &ParamSet, inputs: &Inputs) -> Result<GradStore> {
    let velocity = composed::velocity(model, params, inputs.all())?;
    Ok((&velocity * &inputs.x)?.sum_all()?.backward()?)
}

/// The same block by block.
pub fn block_wise(
    model: &Model,
    params: &ParamSet,
    layout: &Layout,
    inputs: &Inputs,
    each: usize,
) -> Result<Gradients> {
    let Inputs { x, t, conditioning } = inputs;
    let (_, tape) = engine::forward(model, params, x, t, conditioning, Checkpointing(each))?;
    let mut gradients = Gradients::zeros(layout, &Partition::new(layout, 1), &Device::Cpu)?;
    engine::backward(model, params, tape, x, |stage, of_stage| gradients.add(stage, of_stage))?;
    Ok(gradients)
}

/// The model with what of it is trained, and random parameters, none of them zero: else most gradients are.
pub fn trained(trainable: Trainable) -> Result<(Model, Layout, ParamSet)> {
    let lora = (trainable == Trainable::Lora).then(LoraConfig::default);
    let model = model(lora.as_ref());
    let specs = model.specs();
    let layout = Layout::new(&specs, trainable);
    let mut id = 0;
    let set = ParamSet::build(&specs, |spec| {
        id += 1;
        let normals = Stream::new(2, Purpose::Pretrain, [id, 0, 0, 0]).normals(spec.shape.iter().product());
        let fan_in = spec.shape.iter().skip(1).product::<usize>() as f64;
        let std = if spec.shape.len() == 2 { fan_in.powf(-0.5) } else { 0.3 };
        Ok((Tensor::from_vec(normals, spec.shape.as_slice(), &Device::Cpu)? * std)?)
    })?;
    let params = set.with_flat(&layout, &set.flatten(&layout)?)?;
    Ok((model, layout, params))
}
