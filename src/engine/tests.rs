//! The block-wise backward pass against the monolithic one and against finite differences.

use super::*;
use crate::model::glyphs;
use crate::params::{Layout, LoraConfig, ParamSet, Trainable};
use crate::rng::{Purpose, Stream};
use crate::shard::{Gradients, Partition};
use candle_core::{DType, Device};

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
    params: &ParamSet,
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
