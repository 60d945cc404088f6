//! The block-wise backward pass against the monolithic one and against finite differences.

use super::*;
use crate::comm::ThreadGroup;
use crate::model::glyphs;
use crate::params::{Layout, LoraConfig, ParamSet, Trainable};
use crate::rng::{Purpose, Stream};
use crate::shard::{Gradients, PartSet, Partition, Parts};
use candle_core::{DType, Device};
use std::rc::Rc;

fn config() -> glyphs::Config {
    glyphs::Config {
        width: 24,
        heads: 2,
        depth: 3,
        patch: 6,
        picture: (12, 18),
        characters: 3,
        alphabet: 11,
        colours: 4,
    }
}

fn noise(id: u64, shape: &[usize]) -> Result<Tensor> {
    let values = Stream::new(5, Purpose::Parameters, [id, 0, 0, 0]).normals(shape.iter().product());
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// A model whose zero-initialised parameters are not zero, so that every gradient is.
fn random(model: &Model, trainable: Trainable) -> Result<(ParamSet, Layout)> {
    let specs = model.specs();
    let mut id = 100;
    let set = ParamSet::build(&specs, |s| {
        id += 1;
        Ok((noise(id, &s.shape)? * 0.2)?)
    })?;
    let layout = Layout::new(&specs, trainable);
    Ok((set.with_flat(&layout, &set.flatten(&layout)?)?, layout))
}

fn inputs() -> Result<(Tensor, Tensor, Vec<Tensor>)> {
    let characters = Tensor::new(&[[1u32, 2, 3], [4, 5, 10]], &Device::Cpu)?;
    let colours = Tensor::new(&[[0u32, 1], [2, 3]], &Device::Cpu)?;
    Ok((noise(1, &[2, 3, 12, 18])?, Tensor::new(&[0.3f32, 0.9], &Device::Cpu)?, vec![characters, colours]))
}

/// The same model run as one graph.
fn monolithic(model: &Model, params: &ParamSet) -> Result<Tensor> {
    let (x, t, conditioning) = inputs()?;
    let mut io = Pass::new(params, &x, &t, &conditioning).inputs;
    for (index, stage) in model.stages.iter().enumerate() {
        io = stage.forward(params.stage(index), &io)?;
    }
    Ok(io.remove(0))
}

fn block_wise(
    model: &Model,
    params: &dyn Weights,
    layout: &Layout,
    dv: &Tensor,
    checkpointing: Checkpointing,
) -> Result<Tensor> {
    let (x, t, conditioning) = inputs()?;
    let (_, tape) = forward(model, params, &x, &t, &conditioning, checkpointing)?;
    let mut gradients = Gradients::zeros(layout, &Partition::new(layout, 1), &Device::Cpu)?;
    backward(model, params, tape, dv, |stage, of_stage| gradients.add(stage, of_stage))?;
    gradients.check()?;
    Ok(gradients.sum().clone())
}

fn check(lora: Option<&LoraConfig>, trainable: Trainable) -> Result<()> {
    let model = glyphs::model(&config(), lora);
    let (params, layout) = random(&model, trainable)?;
    let v = monolithic(&model, &params)?;
    let dv = noise(2, v.dims())?;
    let store = (&v * &dv)?.sum_all()?.backward()?;
    let flat = block_wise(&model, &params, &layout, &dv, Checkpointing::EACH)?.to_vec1::<f32>()?;
    for other in [0, 2, 3] {
        let other = block_wise(&model, &params, &layout, &dv, Checkpointing(other))?.to_vec1::<f32>()?;
        assert!(other == flat, "checkpointing changes speed and memory, not a bit of a gradient");
    }
    for e in &layout.entries {
        let (_, tensor) = params.stage(e.stage).iter().find(|(slot, _)| *slot == e.slot).expect("the parameter");
        let whole = store.get(tensor).expect("a gradient").flatten_all()?.to_vec1::<f32>()?;
        let norm = whole.iter().map(|x| x * x).sum::<f32>().sqrt();
        let error = whole.iter().zip(&flat[e.offset..]).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        assert!(norm > 0.0, "{} has a zero gradient", e.name);
        assert!(error <= 1e-6 * norm, "{}: {error} of {norm}", e.name);
    }
    Ok(())
}

#[test]
fn block_wise_gradients_equal_the_monolithic_ones() -> Result<()> {
    check(None, Trainable::Full)?;
    check(Some(&LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() }), Trainable::Lora)
}

/// Weights in parts give the bits of whole ones, velocities and gradients, however many ranks hold them and whichever
/// stages keep their graphs; and three sets at once send what they have in common once.
#[test]
fn weights_in_parts_are_the_same_weights() -> Result<()> {
    let lora = LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() };
    for (ranks, trainable) in [(1, Trainable::Full), (2, Trainable::Full), (3, Trainable::Lora)] {
        ThreadGroup::run(ranks, |world| {
            let model = glyphs::model(&config(), (trainable == Trainable::Lora).then_some(&lora));
            let (specs, comm) = (model.specs(), &world.device);
            let (params, layout) = random(&model, trainable)?;
            let slots: Rc<[usize]> = specs.iter().map(|stage| stage.len()).collect();
            let frozen = Rc::new(Parts::cut(&params, &Layout::frozen(&specs, trainable), DType::F32, comm)?);
            let policy = PartSet::new(&slots, &frozen, Some(Parts::cut(&params, &layout, DType::F32, comm)?));
            let half = params.with_flat(&layout, &(params.flatten(&layout)? * 0.5)?)?;
            let old = PartSet::new(&slots, &frozen, Some(Parts::cut(&half, &layout, DType::F32, comm)?));
            let (x, t, conditioning) = inputs()?;
            let dv = noise(2, &[2, 3, 12, 18])?;
            for checkpointing in [0, 1, 2].map(Checkpointing) {
                let whole = block_wise(&model, &params, &layout, &dv, checkpointing)?;
                let parts = block_wise(&model, &policy, &layout, &dv, checkpointing)?;
                assert!(whole.to_vec1::<f32>()? == parts.to_vec1::<f32>()?, "{ranks} ranks, {checkpointing:?}");
            }
            let run = |sets: [&dyn Weights; 2]| {
                let [first, second] = sets.map(|set| Pass::new(set, &x, &t, &conditioning));
                let (v, others, _) = forward_beside(&model, first, vec![second], Checkpointing::EACH)?;
                Ok::<_, Error>([v, others[0].clone()].map(|v| v.flatten_all()))
            };
            let before = world.sent();
            let parts = run([&policy, &old])?;
            let sent = world.sent() - before;
            for (parts, whole) in parts.into_iter().zip(run([&params, &half])?) {
                assert!(parts?.to_vec1::<f32>()? == whole?.to_vec1::<f32>()?);
            }
            let shard = |layout: &Layout| Partition::new(layout, ranks).shard_len();
            let once = shard(&Layout::frozen(&specs, trainable)) + 2 * shard(&layout);
            assert_eq!(sent as usize, 4 * (ranks - 1) * once);
            Ok(())
        })?;
    }
    Ok(())
}

/// The same gradient in bf16: weights and activations have 8 bits, and their errors add up over five stages.
#[test]
fn gradients_in_bf16_are_those_of_f32_within_two_percent() -> Result<()> {
    let model = glyphs::model(&config(), None);
    let (params, layout) = random(&model, Trainable::Full)?;
    let narrow = ParamSet::build(&model.specs(), |_| Ok(Tensor::zeros(1, DType::BF16, &Device::Cpu)?))?;
    let narrow = narrow.with_flat(&layout, &params.flatten(&layout)?)?;
    let dv = noise(2, &[2, 3, 12, 18])?;
    let gradient = |params| -> Result<Vec<f32>> {
        Ok(block_wise(&model, params, &layout, &dv, Checkpointing::EACH)?.to_vec1::<f32>()?)
    };
    let (wide, narrow) = (gradient(&params)?, gradient(&narrow)?);
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
    let error = norm(&mut wide.iter().zip(&narrow).map(|(a, b)| a - b)) / norm(&mut wide.iter().copied());
    assert!(error > 1e-4 && error < 2e-2, "{error}");
    Ok(())
}

#[test]
fn gradients_agree_with_finite_differences() -> Result<()> {
    let model = glyphs::model(&config(), None);
    let (params, layout) = random(&model, Trainable::Full)?;
    let dv = noise(2, &[2, 3, 12, 18])?;
    let flat = block_wise(&model, &params, &layout, &dv, Checkpointing::EACH)?;
    // Along the gradient itself the change of f32 sums is large enough to be seen.
    let direction = flat.narrow(0, 0, layout.total)?;
    let norm2 = f64::from(direction.sqr()?.sum_all()?.to_scalar::<f32>()?);
    let at = |step: f64| -> Result<f64> {
        let moved = (params.flatten(&layout)? + (&direction * (step / norm2.sqrt()))?)?;
        let v = monolithic(&model, &params.with_flat(&layout, &moved)?)?;
        Ok((v.to_dtype(DType::F64)? * dv.to_dtype(DType::F64)?)?.sum_all()?.to_scalar::<f64>()?)
    };
    let numeric = (at(1e-2)? - at(-1e-2)?) / 2e-2;
    assert!((numeric / norm2.sqrt() - 1.0).abs() < 1e-3, "{numeric} {}", norm2.sqrt());
    Ok(())
}

#[test]
fn a_parameter_without_a_gradient_is_named() -> Result<()> {
    let model = glyphs::model(&config(), None);
    let (_, layout) = random(&model, Trainable::Full)?;
    let mut gradients = Gradients::zeros(&layout, &Partition::new(&layout, 1), &Device::Cpu)?;
    assert!(gradients.check().is_ok(), "no backward pass, no gradients");
    gradients.add(0, Vec::new())?;
    let error = gradients.check().expect_err("no gradient was added");
    assert!(error.to_string().contains("pos_embed.proj.weight"), "{error}");
    Ok(())
}

#[test]
fn a_sample_does_not_depend_on_its_neighbours() -> Result<()> {
    let model = glyphs::model(&config(), None);
    let (params, _) = random(&model, Trainable::Full)?;
    let (x, t, conditioning) = inputs()?;
    let both = velocity(&model, &params, &x, &t, &conditioning)?;
    let order = Tensor::new(&[1u32, 1], &Device::Cpu)?;
    let pick = |x: &Tensor| x.index_select(&order, 0);
    let conditioning: Vec<Tensor> = conditioning.iter().map(pick).collect::<candle_core::Result<_>>()?;
    let second = velocity(&model, &params, &pick(&x)?, &pick(&t)?, &conditioning)?;
    let bits = |t: &Tensor, i: usize| -> Result<Vec<f32>> { Ok(t.get(i)?.flatten_all()?.to_vec1::<f32>()?) };
    assert_eq!(bits(&both, 1)?, bits(&second, 0)?);
    assert_eq!(bits(&both, 1)?, bits(&second, 1)?);
    Ok(())
}
