//! Every operation and the transformer on a GPU, against the CPU and against composed operations of candle. Where there is
//! no GPU each test says so and passes: launch/gpu-check.sh runs them where there is one.

mod rewards;

use crate::case::Case;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use flowrl_dist::comm::Solo;
use flowrl_dist::device::{DeviceChoice, select};
use flowrl_dist::engine::{self, Checkpointing};
use flowrl_dist::model::Model;
use flowrl_dist::model::mmdit::{self, Config};
use flowrl_dist::ops;
use flowrl_dist::ops::Wanted;
use flowrl_dist::optim::{OldPolicySchedule, OptimConfig, Sharded};
use flowrl_dist::params::{Layout, LoraConfig, ParamSet, Trainable};
use flowrl_dist::rng::{Purpose, Stream};
use flowrl_dist::shard::{Gradients, Partition, Sharding};

/// The GPU, or nothing and a loud line.
fn gpu() -> Option<Device> {
    let (device, why) = select(DeviceChoice::Auto, 0, 1).unwrap();
    if device.is_cpu() {
        println!("SKIPPED, NOTHING WAS TESTED: {why}");
        return None;
    }
    Some(device)
}

/// Whether the GPU is the CPU (launch/emulate-gpu.sh), which takes minutes for what is large.
fn is_emulated() -> bool {
    std::env::var_os("EMULATED_GPU").is_some()
}

fn noise(id: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let values = Stream::new(11, Purpose::Parameters, [id, 0, 0, 0]).normals(shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

fn values(t: &Tensor) -> Result<Vec<f32>> {
    t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// Largest difference over the largest number.
fn error(found: &Tensor, expected: &Tensor) -> Result<f64> {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (values(found)?, values(expected)?);
    let largest = expected.iter().fold(1e-9f32, |a, b| a.max(b.abs()));
    let worst = found.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs() / largest));
    Ok(worst.fold(0.0, |a, b| if b.is_nan() || b > a { b } else { a }))
}

type Function = fn(&[Tensor]) -> Result<Tensor>;

/// Value and gradients of `sum(f(x) g)` for a fixed random g, on a device.
fn value_and_gradients(f: Function, inputs: &[Tensor], device: &Device, dtype: DType) -> Result<Vec<Tensor>> {
    let leaf = |t: &Tensor| Ok(Var::from_tensor(&t.to_dtype(dtype)?.to_device(device)?)?.into_inner());
    let vars: Vec<Tensor> = inputs.iter().map(leaf).collect::<Result<_>>()?;
    let y = f(&vars)?;
    let g = noise(99, y.dims(), DType::BF16)?.to_dtype(y.dtype())?.to_device(device)?;
    let store = (&y * &g)?.sum_all()?.backward()?;
    let mut all = vec![y.detach()];
    all.extend(vars.iter().map(|v| store.get(v).expect("a gradient for every input").clone()));
    Ok(all)
}

/// On the GPU in f32 and bf16 against the CPU and the composed form in f32, on numbers that bf16 has; twice the same bits.
fn check(name: &str, f: Function, composed: Function, shapes: &[&[usize]]) -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let inputs: Vec<Tensor> =
        shapes.iter().enumerate().map(|(i, s)| noise(i as u64, s, DType::BF16)).collect::<Result<_>>()?;
    let expected = value_and_gradients(f, &inputs, &Device::Cpu, DType::F32)?;
    let composed = value_and_gradients(composed, &inputs, &gpu, DType::F32)?;
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 1.5e-2)] {
        let found = value_and_gradients(f, &inputs, &gpu, dtype)?;
        let again = value_and_gradients(f, &inputs, &gpu, dtype)?;
        for (i, found) in found.iter().enumerate() {
            let (cpu, candle) = (error(found, &expected[i])?, error(found, &composed[i])?);
            println!("{name} {shapes:?} {dtype:?} {i}: off by {cpu:.1e} from the CPU, {candle:.1e} from candle");
            assert!(cpu < tolerance && candle < tolerance, "{name} of {dtype:?}, number {i}: {cpu:.1e}, {candle:.1e}");
            assert_eq!(values(found)?, values(&again[i])?, "{name} of {dtype:?} has other bits the second time");
        }
    }
    Ok(())
}

#[test]
fn linear() -> Result<()> {
    check(
        "linear",
        |t| ops::linear(&t[0], &t[1], Some(&t[2])),
        |t| t[0].reshape(((), 72))?.matmul(&t[1].t()?)?.reshape((3, 50, 96))?.broadcast_add(&t[2]),
        &[&[3, 50, 72], &[96, 72], &[96]],
    )?;
    check("linear", |t| ops::linear(&t[0], &t[1], None), |t| t[0].matmul(&t[1].t()?), &[&[17, 33], &[65, 33]])
}

/// The frozen layer as a constant, of numbers that bf16 has.
#[test]
fn lora() -> Result<()> {
    fn frozen(t: &Tensor) -> Result<(Tensor, Tensor)> {
        let constant = |id, shape: &[usize]| noise(id, shape, DType::BF16)?.to_dtype(t.dtype())?.to_device(t.device());
        Ok((constant(60, &[96, 72])?, constant(61, &[96])?))
    }
    fn fused(t: &[Tensor]) -> Result<Tensor> {
        let (w, b) = frozen(&t[0])?;
        ops::lora(&t[0], (&w, Some(&b)), (&t[1], &t[2], 0.5), Wanted::Value)
    }
    fn composed(t: &[Tensor]) -> Result<Tensor> {
        let (w, b) = frozen(&t[0])?;
        let x = t[0].reshape(((), 72))?;
        let beside = (x.matmul(&t[1].t()?)?.matmul(&t[2].t()?)? * 0.5)?;
        (x.matmul(&w.t()?)?.broadcast_add(&b)? + beside)?.reshape((3, 50, 96))
    }
    check("lora", fused, composed, &[&[3, 50, 72], &[32, 72], &[96, 32]])
}

/// An adapter's factors of f32 beside a layer of bf16. What the adapter adds, and what an update changes of it, come through
/// whole, though less than the last bit of the layer's result; of factors rounded to bf16 they would not.
#[test]
fn adapters_in_f32_beside_bf16() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let [x, w, bias] =
        [(0, vec![3, 50, 72]), (1, vec![96, 72]), (2, vec![96])].map(|(id, s)| noise(id, &s, DType::BF16));
    let (x, w, bias, a) = (x?, w?, bias?, noise(3, &[32, 72], DType::F32)?);
    let run = |a: &Tensor, b: &Tensor, device: &Device, dtype: DType| -> Result<Vec<Tensor>> {
        let [x, w, bias] = [&x, &w, &bias].map(|t| t.to_dtype(dtype)?.to_device(device));
        let (x, w, bias) = (Var::from_tensor(&x?)?, w?, bias?);
        let (a, b) = (Var::from_tensor(&a.to_device(device)?)?, Var::from_tensor(&b.to_device(device)?)?);
        let y = ops::lora(&x, (&w, Some(&bias)), (&a, &b, 0.5), Wanted::Value)?;
        let g = noise(99, y.dims(), DType::BF16)?.to_dtype(dtype)?.to_device(device)?;
        let store = ops::seed(&y, &g)?.backward()?;
        let gradients = [&x, &a, &b].map(|t| store.get(t).expect("a gradient").clone());
        assert_eq!(gradients.each_ref().map(Tensor::dtype), [dtype, DType::F32, DType::F32]);
        std::iter::once(y.detach()).chain(gradients).map(|t| t.to_device(&Device::Cpu)?.to_dtype(DType::F32)).collect()
    };
    // How much of `part` is in `whole`.
    let share = |whole: &Tensor, part: &Tensor| -> Result<f32> {
        Ok((whole * part)?.sum_all()?.to_scalar::<f32>()? / part.sqr()?.sum_all()?.to_scalar::<f32>()?)
    };
    let b = (noise(4, &[96, 32], DType::F32)? * 0.1)?;
    let (found, expected) = (run(&a, &b, &gpu, DType::BF16)?, run(&a, &b, &Device::Cpu, DType::F32)?);
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let error = error(found, expected)?;
        println!("adapter in f32 beside bf16, number {i}: off by {error:.1e}");
        assert!(error < 1.5e-2, "number {i}: {error:.1e}");
    }
    // A young adapter, and an update of an older one.
    let (zero, young) = (b.zeros_like()?, (noise(5, &[96, 32], DType::F32)? * 2e-5)?);
    let moved = (&b + (noise(6, &[96, 32], DType::F32)? * 3e-4)?)?;
    for (name, before, after) in [("young", &zero, &young), ("moved", &b, &moved)] {
        let change = |before: &Tensor, after: &Tensor, device: &Device, dtype| -> Result<Tensor> {
            &run(&a, after, device, dtype)?[0] - &run(&a, before, device, dtype)?[0]
        };
        let expected = change(before, after, &Device::Cpu, DType::F32)?;
        let rounded = |t: &Tensor| t.to_dtype(DType::BF16)?.to_dtype(DType::F32);
        let rounding = (change(&rounded(before)?, &rounded(after)?, &Device::Cpu, DType::F32)? - &expected)?;
        let found = change(before, after, &gpu, DType::BF16)?;
        let (whole, rounded) = (share(&found, &expected)?, share(&(&found - &expected)?, &rounding)?);
        println!("{name} adapter: {whole:.3} of its change, {rounded:.3} of its rounding to bf16");
        assert!((whole - 1.0).abs() < 0.15, "{name}: {whole}");
        assert!(name == "young" || rounded.abs() < 0.25, "{name}: {rounded}");
    }
    Ok(())
}

#[test]
fn layer_norm_modulate() -> Result<()> {
    fn composed(t: &[Tensor]) -> Result<Tensor> {
        let n = t[0].dim(D::Minus1)? as f64;
        let x = t[0].broadcast_sub(&(t[0].sum_keepdim(D::Minus1)? / n)?)?;
        let x = x.broadcast_div(&((x.sqr()?.sum_keepdim(D::Minus1)? / n)? + 1e-6)?.sqrt()?)?;
        x.broadcast_mul(&(t[2].unsqueeze(1)? + 1.0)?)?.broadcast_add(&t[1].unsqueeze(1)?)
    }
    for [b, t, d] in [[3, 5, 41], [2, 1229, 1536]] {
        let f: Function = |t| ops::layer_norm_modulate(&t[0], &t[1], &t[2], 1e-6);
        check("layer_norm_modulate", f, composed, &[&[b, t, d], &[b, d], &[b, d]])?;
    }
    Ok(())
}

#[test]
fn rms_norm() -> Result<()> {
    fn composed(t: &[Tensor]) -> Result<Tensor> {
        let n = t[0].dim(D::Minus1)? as f64;
        t[0].broadcast_div(&((t[0].sqr()?.sum_keepdim(D::Minus1)? / n)? + 1e-6)?.sqrt()?)?.broadcast_mul(&t[1])
    }
    check("rms_norm", |t| ops::rms_norm(&t[0], &t[1], 1e-6), composed, &[&[2, 1229, 3, 64], &[64]])
}

#[test]
fn activations() -> Result<()> {
    fn tanh_gelu(t: &[Tensor]) -> Result<Tensor> {
        let x = &t[0];
        let u = ((x + ((x.sqr()? * x)? * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
        (x * (u.tanh()? + 1.0)?)?.affine(0.5, 0.0)
    }
    check("gelu", |t| ops::gelu(&t[0]), tanh_gelu, &[&[31, 1025]])?;
    check("silu", |t| ops::silu(&t[0]), |t| t[0].silu(), &[&[31, 1025]])
}

#[test]
fn linear_gelu() -> Result<()> {
    check(
        "linear_gelu",
        |t| ops::linear_gelu(&t[0], &t[1], Some(&t[2])),
        |t| ops::gelu(&t[0].reshape(((), 72))?.matmul(&t[1].t()?)?.reshape((3, 50, 96))?.broadcast_add(&t[2])?),
        &[&[3, 50, 72], &[96, 72], &[96]],
    )
}

#[test]
fn gated_residual() -> Result<()> {
    check(
        "gated_residual",
        |t| ops::gated_residual(&t[0], &t[1], &t[2]),
        |t| &t[0] + t[2].broadcast_mul(&t[1].unsqueeze(1)?)?,
        &[&[3, 200, 20], &[3, 20], &[3, 200, 20]],
    )
}

#[test]
fn attention() -> Result<()> {
    fn composed(t: &[Tensor]) -> Result<Tensor> {
        let head = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        let (q, k, v) = (head(&t[0])?, head(&t[1])?, head(&t[2])?);
        let logits = (q.matmul(&k.t()?.contiguous()?)? * (q.dim(D::Minus1)? as f64).powf(-0.5))?;
        candle_nn::ops::softmax(&logits, D::Minus1)?.matmul(&v)?.transpose(1, 2)?.contiguous()
    }
    // The last one is a block of Stable Diffusion 3.5: 1024 tokens of the image and 205 of the text.
    let shapes = [[2, 150, 3, 8], [1, 5, 2, 64], [2, 333, 3, 64], [1, 1229, 4, 64]];
    for shape in &shapes[..if is_emulated() { 2 } else { 4 }] {
        let shape: &[usize] = shape;
        check("attention", |t| ops::attention(&t[0], &t[1], &t[2]), composed, &[shape; 3])?;
    }
    Ok(())
}

/// Latents of 512 and 1024 pixels. f32 only: velocities are.
#[test]
fn deviations() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for shape in [[4, 16, 64, 64], [2, 16, 128, 128]] {
        let [b, c, h, w] = shape;
        let others = noise(1, &[b, 3, c, h, w], DType::F32)?;
        let factors = noise(2, &[b, 3, 3], DType::F32)?;
        let v = [noise(0, &shape, DType::F32)?];
        let on = |device: &Device| -> Result<Vec<Tensor>> {
            let (others, factors) = (others.to_device(device)?, factors.to_device(device)?);
            let v = Var::from_tensor(&v[0].to_device(device)?)?;
            let sums = ops::deviations(v.as_tensor(), &others, &factors)?;
            let d = noise(9, sums.dims(), DType::F32)?.to_device(device)?;
            let dv = (&sums * d)?.sum_all()?.backward()?.get(v.as_tensor()).expect("a gradient").clone();
            Ok(vec![sums.detach(), dv])
        };
        let (expected, found, again) = (on(&Device::Cpu)?, on(&gpu)?, on(&gpu)?);
        for (i, found) in found.iter().enumerate() {
            let error = error(found, &expected[i])?;
            println!("deviations {shape:?} {i}: off by {error:.1e} from the CPU");
            assert!(error < 1e-5);
            assert_eq!(values(found)?, values(&again[i])?, "deviations have other bits the second time");
        }
    }
    Ok(())
}

/// What the autoencoder is made of, which has no derivative.
#[test]
fn convolution_group_norm_and_a_wide_head() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let inputs = [
        noise(1, &[2, 18, 15, 24], DType::BF16)?,
        noise(2, &[3, 3, 24, 40], DType::BF16)?,
        noise(3, &[40], DType::BF16)?,
        noise(4, &[24], DType::BF16)?,
        noise(5, &[1, 70, 1, 512], DType::BF16)?,
    ];
    let run = |device: &Device, dtype: DType| -> Result<Vec<Tensor>> {
        let on = inputs.iter().map(|t| t.to_device(device)?.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
        let [x, weight, bias, scale, qkv] = &on[..] else { unreachable!() };
        let mut all = [ops::Walk::Same, ops::Walk::Half, ops::Walk::Double]
            .map(|walk| ops::convolution(x, weight, bias, walk, None))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        all.push(ops::convolution(x, weight, bias, ops::Walk::Same, Some(&all[0]))?);
        all.push(ops::group_norm(x, scale, scale, 8, 1e-6, true)?);
        all.push(ops::attention(qkv, qkv, qkv)?);
        Ok(all)
    };
    let expected = run(&Device::Cpu, DType::F32)?;
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 1.5e-2)] {
        for (i, (found, expected)) in run(&gpu, dtype)?.iter().zip(&expected).enumerate() {
            let error = error(found, expected)?;
            println!("autoencoder's operation {i} of {dtype:?}: off by {error:.1e}");
            assert!(error < tolerance, "{i} of {dtype:?}: {error:.1e}");
        }
    }
    Ok(())
}

#[test]
fn time_features() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let t = Tensor::new(&[0f32, 0.001, 0.37, 1.0], &Device::Cpu)?;
    let found = ops::time_features(&t.to_device(&gpu)?, 128)?;
    assert!(error(&found, &ops::time_features(&t, 128)?)? < 1e-6);
    Ok(())
}

/// Three AdamW steps on the flat shard, and the slow copies that follow.
#[test]
fn optimizer() -> flowrl_dist::Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let model = small_model(None)?;
    let specs = model.specs();
    let layout = Layout::new(&specs, Trainable::Full);
    let run = |device: &Device| -> flowrl_dist::Result<Vec<Tensor>> {
        let flat = ParamSet::init(&specs, 3, device)?.flatten(&layout)?;
        let mut state = Sharded::new(&flat, &layout, Sharding::Optimizer, &Solo)?;
        let mut norms = Vec::new();
        for i in 0..3 {
            let gradient = noise(i, &[layout.total], DType::F32)?.to_device(device)?;
            norms.push(state.step(&gradient, &OptimConfig::default(), 1e-2, &Solo)?.norm as f32);
            state.update_ema(0.9)?;
        }
        state.update_old(OldPolicySchedule::Linear.decay())?;
        let norms = Tensor::from_vec(norms, 3, device)?;
        Ok(vec![norms, state.policy()?, state.old().clone(), state.ema().clone()])
    };
    for (name, (found, expected)) in
        ["norm", "policy", "old", "ema"].iter().zip(run(&gpu)?.iter().zip(&run(&Device::Cpu)?))
    {
        let error = error(found, expected)?;
        println!("optimizer: {name} off by {error:.1e}");
        assert!(error < 1e-6, "{name}: {error:.1e}");
    }
    Ok(())
}

/// Heads of 64 features, as the full model has, two of three blocks with a second attention.
fn small_model(lora: Option<&LoraConfig>) -> flowrl_dist::Result<Model> {
    let config = Config {
        num_layers: 3,
        num_attention_heads: 3,
        joint_attention_dim: 96,
        caption_projection_dim: 192,
        pooled_projection_dim: 64,
        pos_embed_max_size: 16,
        dual_attention_layers: vec![0, 1],
        ..Config::sd35_medium()
    };
    mmdit::model(&config, (16, 24), lora)
}

/// Velocity and flat gradient of a model at fixed inputs.
fn velocity_and_gradient(
    model: &Model,
    trainable: Trainable,
    each: usize,
    device: &Device,
    dtype: DType,
) -> flowrl_dist::Result<(Tensor, Tensor)> {
    let specs = model.specs();
    let layout = Layout::new(&specs, trainable);
    // Nothing is zero, as it is at the start of training.
    let params = ParamSet::build(&specs, |spec| {
        let tensor = spec.initial(3, &Device::Cpu)?;
        let tensor = (tensor + (noise(blake(&spec.name), &spec.shape, DType::F32)? * 0.02)?)?;
        let tensor = tensor.to_dtype(spec.role.dtype(dtype))?.to_device(device)?;
        Ok(if spec.role == trainable.role() { Var::from_tensor(&tensor)?.into_inner() } else { tensor })
    })?;
    let input = |id: u64, shape: &[usize]| noise(id, shape, DType::BF16)?.to_dtype(DType::F32)?.to_device(device);
    let (c, h, w) = model.latent;
    let (x, text, pooled) = (input(1, &[2, c, h, w])?, input(2, &[2, 7, 96])?, input(3, &[2, 64])?);
    let t = Tensor::new(&[0.3f32, 0.9], device)?;
    let (v, tape) = engine::forward(model, &params, &x, &t, &[text, pooled], Checkpointing(each))?;
    let mut gradients = Gradients::zeros(&layout, &Partition::new(&layout, 1), device)?;
    engine::backward(model, &params, tape, &input(4, &[2, c, h, w])?, |stage, of| gradients.add(stage, of))?;
    gradients.check()?;
    Ok((v, gradients.sum().clone()))
}

fn blake(name: &str) -> u64 {
    name.bytes().fold(7, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Relative, by norm.
fn distance(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let (found, expected) = (values(found)?, values(expected)?);
    let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    Ok(norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied()))
}

/// All of it trained, and adapters alone, with blocks that run again and with blocks that keep their graph.
#[test]
fn transformer() -> flowrl_dist::Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let lora = LoraConfig { targets: mmdit::LORA_TARGETS.map(String::from).to_vec(), ..LoraConfig::default() };
    for trainable in [Trainable::Full, Trainable::Lora] {
        let model = small_model((trainable == Trainable::Lora).then_some(&lora))?;
        let run = |each, device: &Device, dtype| velocity_and_gradient(&model, trainable, each, device, dtype);
        let (v, gradient) = run(1, &Device::Cpu, DType::F32)?;
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 3e-2)] {
            for each in [0, 1] {
                let (found_v, found) = run(each, &gpu, dtype)?;
                let errors = (distance(&found_v, &v)?, distance(&found, &gradient)?);
                println!("transformer, {trainable:?} of {dtype:?}, {each}: off by {:.1e}, {:.1e}", errors.0, errors.1);
                assert!(errors.0 < tolerance && errors.1 < 2.0 * tolerance, "{dtype:?}: {errors:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn parity_of_the_transformer_with_diffusers_on_the_gpu() -> flowrl_dist::Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let names: &[&str] = if is_emulated() { &["sd3_micro"] } else { &["sd3_micro", "sd3_tiny"] };
    for name in names {
        let mut case = Case::full(name)?;
        let mut tensors = (0..case.model.stages.len())
            .flat_map(|stage| case.params.stage(stage).iter().map(|(_, tensor)| tensor.clone()).collect::<Vec<_>>());
        // Every parameter is there, in the order of the specs.
        let params = ParamSet::build(&case.model.specs(), |_| {
            let tensor = tensors.next().expect("a tensor for every parameter");
            Ok(match tensor.is_variable() {
                true => Var::from_tensor(&tensor.detach().to_device(&gpu)?)?.into_inner(),
                false => tensor.to_device(&gpu)?,
            })
        })?;
        drop(tensors);
        for tensor in case.io.values_mut() {
            *tensor = tensor.to_device(&gpu)?;
        }
        case.params = params;
        let v = case.velocity(&case.params)?;
        let error = error(&v, case.get("out.v"))?;
        println!("{name}: velocity off by {error:.1e}");
        assert!(error < 2e-5, "{name}: {error:.1e}");
    }
    Ok(())
}
