//! The base model: a small network of the library's layers, fitted to the ring by rectified-flow regression.

use super::law::{SEED, draw};
use candle_core::{Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::comm::Solo;
use flowrl_dist::data::Prompt;
use flowrl_dist::model::{Linear, Model, Stage, TimeEmbedding};
use flowrl_dist::ops;
use flowrl_dist::optim::OptimConfig;
use flowrl_dist::params::{Init, Layout, ParamSet, Spec, SpecList, StageParams, Trainable};
use flowrl_dist::pipeline::{Codec, Pipeline};
use flowrl_dist::pretrain::{Examples, Regression};
use flowrl_dist::rng::{Purpose, Stream};
use flowrl_dist::shard::Sharding;

const WIDTH: usize = 96;

/// (x_t `[B, 2, 1, 1]`, t `[B]`) -> `[B, WIDTH]`.
struct Stem {
    specs: Vec<Spec>,
    point: Linear,
    time: TimeEmbedding,
}

impl Stage for Stem {
    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let point = self.point.forward(params, &inputs[0].flatten_from(1)?)?;
        Ok(vec![(point + self.time.forward(params, &inputs[1])?)?])
    }
}

/// `[B, WIDTH]` -> velocity `[B, 2, 1, 1]`.
struct Trunk {
    specs: Vec<Spec>,
    hidden: [Linear; 2],
    out: Linear,
}

impl Stage for Trunk {
    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let mut h = ops::silu(&inputs[0])?;
        for layer in &self.hidden {
            h = ops::silu(&layer.forward(params, &h)?)?;
        }
        Ok(vec![self.out.forward(params, &h)?.reshape(((), 2, 1, 1))?])
    }
}

fn model() -> Model {
    let mut stem = SpecList::new("stem.", None);
    let mut trunk = SpecList::new("trunk.", None);
    let stem = Stem {
        point: Linear::scaled(&mut stem, "point", 2, WIDTH),
        time: TimeEmbedding::new(&mut stem, "time", 16, WIDTH),
        specs: stem.finish(),
    };
    let trunk = Trunk {
        hidden: ["hidden.0", "hidden.1"].map(|name| Linear::scaled(&mut trunk, name, WIDTH, WIDTH)),
        out: Linear::new(&mut trunk, "out", WIDTH, 2, Init::Zeros),
        specs: trunk.finish(),
    };
    Model { stages: vec![Box::new(stem), Box::new(trunk)], latent: (2, 1, 1) }
}

pub fn layout(pipeline: &Pipeline) -> Layout {
    Layout::new(&pipeline.model.specs(), Trainable::Full)
}

/// No conditioning, and samples as they are.
struct Points;

impl Codec for Points {
    fn encode(&self, _prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        Ok(Vec::new())
    }

    fn negative(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        self.encode(prompts)
    }

    fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        Ok(x0.clone())
    }
}

/// The base model, without conditioning.
pub fn pretrained() -> Result<Pipeline> {
    const STEPS: u64 = 2000;
    const BATCH: usize = 256;
    let model = model();
    let base = ParamSet::init(&model.specs(), SEED, &Device::Cpu)?;
    let mut pipeline = Pipeline {
        model,
        base: Box::new(base),
        base_digest: "ring".into(),
        device: Device::Cpu,
        codec: Box::new(Points),
    };
    let mut training = Regression::new(&pipeline, Sharding::None, &Solo)?;
    let config = OptimConfig { weight_decay: 0.0, ..OptimConfig::default() };
    for step in 0..STEPS {
        let stream = |index| Stream::new(SEED, Purpose::Pretrain, [step, 1, 0, index]);
        let x0 = draw(step, BATCH)?;
        let eps = Tensor::from_vec(stream(0).normals(2 * BATCH), x0.shape(), &Device::Cpu)?;
        let t =
            Tensor::from_vec((0..BATCH as u32).map(|i| stream(1).uniform(i) as f32).collect(), BATCH, &Device::Cpu)?;
        let examples = Examples { x0, eps, t, conditioning: Vec::new(), count: BATCH };
        let lr = 3e-3 * (1.0 - step as f64 / STEPS as f64);
        training.step([Ok(examples)], BATCH, &config, lr, &Solo)?;
    }
    let trained = training.params().clone();
    pipeline.base = Box::new(trained);
    Ok(pipeline)
}
