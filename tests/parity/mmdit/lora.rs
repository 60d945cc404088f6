//! Adapters, against recorded values of PEFT.

use super::case::*;
use candle_core::{DType, Device, Tensor};
use flowrl_dist::comm::Solo;
use flowrl_dist::model::mmdit::LORA_TARGETS;
use flowrl_dist::optim::{OptimConfig, Sharded};
use flowrl_dist::params::{LoraConfig, ParamSet, Role, Trainable};
use flowrl_dist::shard::Sharding;
use flowrl_dist::{Error, Result};

/// The model of sd3_micro with the adapters of sd3_lora's file `adapter`, base weights in `dtype`.
fn lora_case(adapter: &str, dtype: DType) -> Result<Case> {
    let lora = LoraConfig { rank: 4, alpha: 8.0, targets: LORA_TARGETS.map(String::from).to_vec() };
    let io = tensors("sd3_lora/io.safetensors");
    let model = build("sd3_micro", &io, Some(&lora))?;
    let specs = model.specs();
    let weights = weights("sd3_micro", &specs);
    let adapters = tensors(&format!("sd3_lora/{adapter}"));
    let mut read = 0;
    let base = ParamSet::build(&specs, |spec| match spec.role {
        Role::Adapter => {
            read += 1;
            let tensor = adapters.get(&format!("base_model.model.{}", spec.name));
            let tensor = tensor.ok_or_else(|| Error::Failed(format!("the file lacks {}", spec.name)))?;
            assert_eq!(tensor.dims(), spec.shape);
            Ok(tensor.clone())
        }
        _ => Ok(weights(spec)?.to_dtype(dtype)?),
    })?;
    assert_eq!(read, adapters.len());
    Case::of("sd3_lora", io, model, base, Trainable::Lora)
}

const DEFAULT: &str = "peft/adapter_model.safetensors";

#[test]
fn parity_of_adapters_with_peft() -> Result<()> {
    let (default, old) =
        (lora_case(DEFAULT, DType::F32)?, lora_case("peft/old/adapter_model.safetensors", DType::F32)?);
    assert_eq!(default.layout.entries.len() as u64, 2 * default.meta["n_modules"].as_u64().expect("a number"));
    let reference = default.params.without_adapters(&default.model.specs());
    for (name, ours) in [
        ("out.v", default.velocity(&default.params)?),
        ("out.v_old", old.velocity(&old.params)?),
        ("out.v_ref", default.velocity(&reference)?),
    ] {
        let error = max_error(&ours, default.get(name))?;
        eprintln!("sd3_lora: {name} {error:.1e}");
        assert!(error <= 1e-5, "{name}: {error:.1e}");
    }
    Ok(())
}

/// Three updates of the adapters: losses, gradients, norms, and the parameters after the first and the third.
#[test]
fn parity_of_adapter_training_with_peft() -> Result<()> {
    let mut case = lora_case(DEFAULT, DType::F32)?;
    let mut state = Sharded::new(&case.params.flatten(&case.layout)?, &case.layout, Sharding::None, &Solo)?;
    let config = OptimConfig::default();
    for update in 1..=3 {
        let dv = |v: &Tensor| case.loss(v, 1.0, 1e-4, ["out.v_old", "out.v_ref"]);
        let loss = dv(&case.velocity(&case.params)?)?.0;
        let flat = case.gradient(1, |v| Ok(dv(v)?.1))?;
        if update == 1 {
            assert_eq!(case.gradient(0, |v| Ok(dv(v)?.1))?, flat, "checkpointing changes not a bit");
            assert_eq!(case.check_gradients(&flat, 1e-4)?.1, case.layout.entries.len());
        }
        let total = flat.len();
        let report = state.step(&Tensor::from_vec(flat, total, &Device::Cpu)?, &config, config.lr, &Solo)?;
        case.params = case.params.with_flat(&case.layout, &state.gather_policy(&Solo)?)?;
        for (what, ours, list) in [("loss", loss, "losses"), ("norm", report.norm, "grad_norms_before_clip")] {
            let recorded = case.meta[list][update - 1].as_f64().expect("a number");
            eprintln!("update {update}: {what} {ours} recorded {recorded}");
            assert!((ours / recorded - 1.0).abs() <= 1e-5, "update {update}: {what} {ours} {recorded}");
        }
        let (mut worst, mut count) = (0.0, 0);
        for e in &case.layout.entries {
            let Some(recorded) = case.io.get(&format!("step{update}.{}", e.name)) else { continue };
            let (_, ours) = case.params.stage(e.stage).iter().find(|(slot, _)| *slot == e.slot).expect("its tensor");
            let error = max_error(ours, recorded)?;
            assert!(error <= 1e-4, "update {update}: {} is off by {error:.1e}", e.name);
            (worst, count) = (f64::max(worst, error), count + 1);
        }
        eprintln!("update {update}: {count} parameters, worst {worst:.1e}");
        assert_eq!(count, if update == 2 { 0 } else { case.layout.entries.len() });
    }
    Ok(())
}

/// Frozen weights in bf16 under adapters in f32: how the full model is trained.
#[test]
fn parity_of_adapters_on_bf16_weights_with_peft() -> Result<()> {
    let case = lora_case(DEFAULT, DType::BF16)?;
    let v = case.velocity(&case.params)?;
    let error = max_error(&v, case.get("out.v"))?;
    eprintln!("sd3_lora on bf16: v {error:.1e}");
    assert!(error <= 2e-2, "{error:.1e}");
    let flat = case.gradient(1, |v| Ok(case.loss(v, 1.0, 1e-4, ["out.v_old", "out.v_ref"])?.1))?;
    case.check_gradients(&flat, 5e-2)?;
    Ok(())
}
