//! The transformer of Stable Diffusion 3.5 against recorded values of diffusers and PEFT (tests/fixtures/sd3_*: each
//! meta.json says how they were made). FLOWRL_FIXTURES names another folder of the same form.
//!
//! `cargo test --release --test parity mmdit:: -- --nocapture` prints the errors.

mod case;
mod lora;

use candle_core::{DType, Device, Tensor, Var};
use case::*;
use flowrl_dist::Result;
use flowrl_dist::model::mmdit::{self, Config};
use flowrl_dist::params::{ParamSet, Role};

/// Of the layouts of Stable Diffusion 3.5 Medium, twice, 3.5 Large and 3 Medium.
const CASES: [&str; 4] = ["sd3_micro", "sd3_tiny", "sd3_large_micro", "sd3_medium_micro"];

#[test]
fn parity_of_hashed_weights() -> Result<()> {
    let case = Case::full("sd3_tiny")?;
    let checks = case.meta["hash_check"].as_object().expect("an object");
    for (name, recorded) in checks {
        let e = case.layout.entries.iter().find(|e| e.name == *name).expect("a parameter of this name");
        let (_, tensor) = case.params.stage(e.stage).iter().find(|(slot, _)| *slot == e.slot).expect("its tensor");
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        let first: Vec<f64> = values[..3].iter().map(|&x| f64::from(x)).collect();
        let sum: f64 = values.iter().map(|&x| f64::from(x)).sum();
        for (ours, recorded) in first.iter().chain([&sum]).zip(recorded.as_array().expect("a list")) {
            let recorded = recorded.as_f64().expect("a number");
            assert!((ours - recorded).abs() <= 1e-9 * recorded.abs().max(1.0), "{name}: {ours} {recorded}");
        }
    }
    assert_eq!(case.layout.total as u64, case.meta["params"].as_u64().expect("a number"));
    Ok(())
}

#[test]
fn parity_of_the_table_of_positions_with_diffusers() -> Result<()> {
    for name in ["sd3_micro", "sd3_large_micro", "sd3_medium_micro"] {
        let config = Config::read(&fixture(&format!("{name}/config.json")))?;
        let model = mmdit::model(&config, (8, 8), None)?;
        let spec = model.stages[0].specs().iter().find(|s| s.role == Role::Buffer).expect("the table");
        let file = tensors(&format!("{name}/diffusion_pytorch_model.safetensors"));
        let error = max_error(&spec.initial(0, &Device::Cpu)?, &file[&spec.name])?;
        assert!(error <= 1e-6, "{name}: {error:.1e}");
    }
    Ok(())
}

#[test]
fn parity_of_every_stage_with_diffusers() -> Result<()> {
    for name in CASES {
        let case = Case::full(name)?;
        check_forward(&case, &case.params, 1e-5)?;
        let whole = case.velocity(&case.params)?;
        assert!(max_error(&whole, case.get("out.v"))? <= 1e-5);
    }
    Ok(())
}

#[test]
fn parity_in_bf16_with_diffusers() -> Result<()> {
    for name in CASES {
        let case = Case::full(name)?;
        let specs = case.model.specs();
        let weights = weights(name, &specs);
        let narrow = ParamSet::build(&specs, |spec| Ok(weights(spec)?.to_dtype(DType::BF16)?))?;
        check_forward(&case, &narrow, 2e-2)?;
    }
    Ok(())
}

#[test]
fn parity_of_the_losses_with_diffusion_nft() -> Result<()> {
    for name in CASES {
        let case = Case::full(name)?;
        let v = case.velocity(&case.params)?;
        let mse = (&v - (case.get("in.noise") - case.get("in.x0"))?)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
        let frozen = ["in.v_old", "in.v_ref"];
        let losses = [
            ("mse", f64::from(mse)),
            ("nft_beta1", case.loss(&v, 1.0, 0.0, frozen)?.0),
            ("nft_beta0.1", case.loss(&v, 0.1, 0.0, frozen)?.0),
            ("nft_beta1_kl", case.loss(&v, 1.0, 1e-2, frozen)?.0),
        ];
        for (loss, ours) in losses {
            let recorded = case.meta["loss"][loss].as_f64().expect("a number");
            eprintln!("{name}: {loss} {ours} recorded {recorded}");
            assert!((ours / recorded - 1.0).abs() <= 2e-6, "{name}: {loss} {ours} {recorded}");
        }
    }
    Ok(())
}

#[test]
fn parity_of_every_gradient_with_diffusers() -> Result<()> {
    for name in CASES {
        let case = Case::full(name)?;
        let dv = |v: &Tensor| Ok(case.loss(v, 1.0, 1e-2, ["in.v_old", "in.v_ref"])?.1);
        let flat = case.gradient(1, dv)?;
        assert_eq!(case.gradient(0, dv)?, flat, "checkpointing changes not a bit");
        let (_, count) = case.check_gradients(&flat, 1e-4)?;
        if name != "sd3_tiny" {
            assert_eq!(count, case.layout.entries.len(), "of the small models every gradient is recorded");
        }
        let norm = flat.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let recorded = case.meta["grad_norm"].as_f64().expect("a number");
        assert!((norm / recorded - 1.0).abs() <= 1e-5, "{name}: norm {norm} {recorded}");

        // Nothing is cut: the one thing whose gradient is zero is the last block's text queries, whose attention nobody
        // reads.
        let last = format!("transformer_blocks.{}.attn.", case.model.stages.len() - 3);
        for e in &case.layout.entries {
            let unread = e
                .name
                .strip_prefix(&last)
                .is_some_and(|n| n.starts_with("add_q_proj.") || n.starts_with("norm_added_q."));
            let zero = flat[e.offset..][..e.len].iter().all(|&x| x == 0.0);
            assert_eq!(zero, unread, "{name}: gradient of {}", e.name);
        }
    }
    Ok(())
}

/// The model as one graph, which also has the gradients of the inputs.
#[test]
fn parity_of_block_wise_and_monolithic_gradients() -> Result<()> {
    let case = Case::full("sd3_micro")?;
    let dv = |v: &Tensor| Ok(case.loss(v, 1.0, 1e-2, ["in.v_old", "in.v_ref"])?.1);
    let flat = case.gradient(1, dv)?;

    let x_t = Var::from_tensor(case.get("in.xt"))?;
    let text = Var::from_tensor(case.get("in.encoder_hidden_states"))?;
    let mut io = vec![x_t.as_tensor().clone(), case.times()?, text.as_tensor().clone(), case.get("in.pooled").clone()];
    for (index, stage) in case.model.stages.iter().enumerate() {
        io = stage.forward(case.params.stage(index), &io)?;
    }
    let store = (&io[0] * dv(&io[0].detach())?)?.sum_all()?.backward()?;
    for e in &case.layout.entries {
        let (_, tensor) = case.params.stage(e.stage).iter().find(|(slot, _)| *slot == e.slot).expect("its tensor");
        let whole = store.get(tensor).expect("a gradient").flatten_all()?.to_vec1::<f32>()?;
        let error = relative_norm(&flat[e.offset..][..e.len], &whole);
        assert!(error <= 1e-6, "{}: {error:.1e}", e.name);
    }
    for (name, input) in [("xt", &x_t), ("encoder_hidden_states", &text)] {
        let flat = |t: &Tensor| -> Result<Vec<f32>> { Ok(t.flatten_all()?.to_vec1()?) };
        let ours = flat(store.get(input).expect("a gradient"))?;
        let error = relative_norm(&ours, &flat(case.get(&format!("gradin.{name}")))?);
        eprintln!("gradient of {name}: {error:.1e}");
        assert!(error <= 1e-4, "{name}: {error:.1e}");
    }
    Ok(())
}
