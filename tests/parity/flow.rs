//! Solvers, grids, advantages and schedules against recorded values of diffusers and DiffusionNFT (tests/fixtures: each
//! folder's meta.json or fields say how it was made). FLOWRL_FIXTURES names another folder of the same form.

use candle_core::{Device, Tensor};
use flowrl_dist::advantage::{AdvantageMap, Map, Normaliser, Scores, group_advantages};
use flowrl_dist::flow::sde::{SdeConfig, log_prob};
use flowrl_dist::flow::{Ode, sigmas, solve};
use flowrl_dist::optim::OldPolicySchedule;
use serde_json::Value;
use std::collections::HashMap;
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var_os("FLOWRL_FIXTURES")
        .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
    folder.join(name)
}

fn json(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture(name)).expect("the fixture");
    serde_json::from_str(&text).expect("JSON")
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture(name), &Device::Cpu).expect("the fixture")
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect()
}

fn max_error(a: &Tensor, b: &Tensor) -> f64 {
    let difference = (a - b).and_then(|d| d.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>());
    f64::from(difference.expect("tensors of one shape"))
}

#[test]
fn parity_of_the_grid_with_diffusers() {
    let recorded = json("scheduler/sigmas.json");
    let grids = recorded.as_object().expect("an object").iter().filter(|(name, _)| name.starts_with("shift"));
    for (name, grid) in grids {
        let numbers_in = |after: &str| -> f64 {
            let digits = name.split('_').find_map(|part| part.strip_prefix(after)).expect("the setting in the name");
            digits.parse().expect("a number")
        };
        let (shift, steps) = (numbers_in("shift"), numbers_in("steps") as usize);
        let expected = numbers(&grid["sigmas"]);
        let ours = sigmas(steps, shift);
        assert_eq!(ours.len(), expected.len());
        // diffusers holds the grid in f32.
        let worst = ours.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-7, "{name}: {worst}");
    }
}

/// The recorded velocities are given step by step, whatever x is: the states must be those of diffusers' scheduler.
#[test]
fn parity_of_euler_with_diffusers() -> flowrl_dist::Result<()> {
    let io = tensors("scheduler/io.safetensors");
    let grid = sigmas(10, 3.0);
    for end in 1..=10 {
        let mut step = 0;
        let x = solve(Ode::Euler, &grid[..=end], &io["in.z"], |_, _| {
            step += 1;
            Ok(io[&format!("in.v{}", step - 1)].clone())
        })?;
        let error = max_error(&x, &io[&format!("out.z{}", end - 1)]);
        assert!(error < 2e-6, "after step {end}: {error}");
    }
    Ok(())
}

/// The toy velocity A x + B s on the shift-3 grid, against the values of DiffusionNFT's solver.
#[test]
fn parity_of_the_solvers_with_diffusion_nft() -> flowrl_dist::Result<()> {
    let io = tensors("solvers/io.safetensors");
    for (solver, name) in [(Ode::Euler, "euler"), (Ode::Dpm2, "dpm2")] {
        for steps in [10, 25] {
            let velocity = |x: &Tensor, s: f64| Ok(((&io["in.A"] * x)? + (&io["in.B"] * s)?)?);
            let mut states = Vec::new();
            let x = solve(solver, &sigmas(steps, 3.0), &io["in.z"], |x, s| {
                states.push(x.clone());
                velocity(x, s)
            })?;
            states.push(x);
            for (i, state) in states.iter().enumerate() {
                let Some(expected) = io.get(&format!("out.toy.{name}.{steps}.z{i}")) else { continue };
                let scale = expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                let error = max_error(state, expected) / f64::from(scale);
                assert!(error < 2e-6, "{name}, {steps} steps, state {i}: {error}");
            }
        }
    }
    Ok(())
}

/// Means, deviations and log-probabilities of Flow-GRPO's stochastic step, as recorded from its program.
#[test]
fn parity_of_the_stochastic_step_with_flow_grpo() -> flowrl_dist::Result<()> {
    let (io, meta) = (tensors("sde_step/io.safetensors"), json("sde_step/meta.json"));
    let steps = meta["steps"].as_object().expect("an object");
    assert!(steps.len() >= 10);
    for (name, recorded) in steps {
        let (level, index) = name.strip_prefix("eta").and_then(|n| n.split_once(".step")).expect("etaA.stepI");
        let config = SdeConfig { noise_level: level.parse().expect("a number"), ..SdeConfig::default() };
        let step = config.step(&sigmas(10, 3.0), index.parse().expect("a number"));
        let number = |key: &str| recorded[key].as_f64().expect("a number");
        assert!((step.rate / number("std_dev_t") - 1.0).abs() < 1e-5, "{name}: rate {}", step.rate);
        assert!((step.std / number("sd") - 1.0).abs() < 1e-5, "{name}: std {}", step.std);
        let input = |tensor: &str| &io[&format!("in.{name}.{tensor}")];
        let output = |tensor: &str| &io[&format!("out.{name}.{tensor}")];
        let mean = ((input("sample") * step.x)? + (input("v") * step.v)?)?;
        let next = (&mean + (input("noise") * step.std)?)?;
        let std = Tensor::full(step.std as f32, mean.dim(0)?, &Device::Cpu)?;
        let log_prob = log_prob(&next, &mean, &std)?;
        let scale = |t: &Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>().map(f64::from);
        for (what, ours) in [("mean", &mean), ("prev_sample", &next), ("log_prob", &log_prob)] {
            let error = max_error(ours, output(what)) / scale(output(what))?.max(1.0);
            assert!(error < 2e-6, "{name}: {what} {error}");
        }
    }
    Ok(())
}

#[test]
fn parity_of_advantages_with_diffusion_nft() -> flowrl_dist::Result<()> {
    let recorded = json("advantages/advantages.json");
    let prompts = recorded["prompts"].as_array().expect("a list");
    let groups: Vec<usize> =
        prompts.iter().map(|p| p.as_str().and_then(|p| p[1..].parse().ok()).expect("p and a number")).collect();
    let rewards = [Scores::new("recorded", 1.0, numbers(&recorded["rewards"]))];
    let linear = AdvantageMap { map: Map::Linear, clip: 1e9, ..AdvantageMap::FLOW_AWR };
    for (normaliser, name) in
        [(Normaliser::GlobalStd, "advantages_global_std"), (Normaliser::GroupStd, "advantages_group_std")]
    {
        let ours = group_advantages(&rewards, &groups, &AdvantageMap { normaliser, ..linear })?.values;
        let worst = ours.iter().zip(numbers(&recorded[name])).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-12, "{name}: {worst}");
    }
    Ok(())
}

/// Soft and hard gating of 10 groups of 24 by the released program's formulas; half of them lie below the gate's floor.
#[test]
fn parity_of_advantages_with_flow_awr() -> flowrl_dist::Result<()> {
    let recorded = json("advantages/flow_awr.json");
    let cases = recorded.as_array().expect("a list");
    let all = |name: &str| cases.iter().flat_map(|case| numbers(&case[name])).collect::<Vec<f64>>();
    let rewards = [Scores::new("recorded", 1.0, all("rewards"))];
    let groups: Vec<usize> = (0..24 * cases.len()).map(|i| i / 24).collect();
    for (map, name) in [(Map::Softmax, "soft"), (Map::GatedSoftmax, "hard")] {
        let ours = group_advantages(&rewards, &groups, &AdvantageMap { map, ..AdvantageMap::FLOW_AWR })?.values;
        let worst = ours.iter().zip(all(name)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-12, "{name}: {worst}");
    }
    let floored = cases.iter().filter(|case| case["floored"].as_bool().expect("true or false")).count();
    assert_eq!((floored, cases.len()), (4, 10));
    Ok(())
}

#[test]
fn parity_of_the_old_policy_schedules_with_diffusion_nft() {
    let recorded = json("advantages/advantages.json");
    for kind in 0..3u8 {
        let schedule = OldPolicySchedule::try_from(kind).expect("a schedule");
        for (n, eta) in recorded["old_policy_decay"][format!("type{kind}")].as_object().expect("an object") {
            let ours = schedule.decay().eta(n.parse().expect("a number"));
            assert!((ours - eta.as_f64().expect("a number")).abs() < 1e-12, "type {kind} at {n}: {ours} {eta}");
        }
    }
}
