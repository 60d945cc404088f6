//! A method of your own: `cargo run --release --example own_method`.
//!
//! Trains the embedded task for two updates by reward-weighted regression. Copy it, and write your
//! own `losses`.

#![allow(clippy::print_stdout)] // a program for a terminal

use candle_core::Tensor;
use flowrl_dist::checkpoint::Resume;
use flowrl_dist::comm::World;
use flowrl_dist::config::RunConfig;
use flowrl_dist::objective::{Losses, Objective, Point, Requirements, TargetVelocities, distance};
use flowrl_dist::train::{Outcome, Own, train};
use flowrl_dist::{Error, Result};
use std::path::Path;

/// `exp(A) mean (v - u)^2 + kl_coef mean (v - v_ref)^2` with u = eps - x0: regression to the
/// samples, the better ones more (Peng et al., arXiv 1910.00177, in the velocity of a rectified
/// flow).
#[derive(Debug)]
struct RewardWeighted {
    kl_coef: f64,
}

impl Objective for RewardWeighted {
    /// Beside the policy's velocity the base model's, where the distance from it counts.
    fn requirements(&self) -> Requirements {
        Requirements { reference: self.kl_coef > 0.0, ..Requirements::default() }
    }

    /// The losses `[B]` at the policy's velocity `v`, `[B, C, H, W]`; their gradient is taken from
    /// here on.
    fn losses(&self, point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Losses> {
        let regression = distance(v, &point.target_velocity()?)?.square; // [B]
        Losses::new((regression * point.advantage.exp()?)?, targets.kl(v, self.kl_coef)?)
    }
}

/// Trains in this process alone. Under `mpirun` or Slurm the world is that of
/// `World::from_environment`; every rank runs the same.
fn run(out: &Path) -> Result<String> {
    // The keys are those of a configuration file and of `--set`.
    let settings = [
        "run.updates=2",
        &format!("run.out={out:?}"),
        "batch.prompts=2",
        "batch.images_per_prompt=4",
        "batch.micro_batch=4",
        "batch.timesteps=2",
        "sampler.steps=4",
        "eval.prompts=4",
    ];
    let config = RunConfig::load(None, &settings.map(String::from))?;
    let own = Own { objective: Some(Box::new(RewardWeighted { kl_coef: 1e-2 })), ..Own::default() };
    match train(&config, own, &Resume::Never, &World::solo())? {
        Outcome::Done(line) => Ok(line),
        Outcome::Interrupted(line) => Err(Error::Failed(line)),
    }
}

fn main() -> Result<()> {
    println!("{}", run(Path::new("runs/own_method"))?);
    Ok(())
}

#[cfg(test)]
#[test]
fn it_trains_by_its_method() -> Result<()> {
    let out = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
    let line = run(out.path())?;
    assert!(line.contains(" after 2 updates, "), "{line}");
    let log = out.path().join("logs/rank_00000.log");
    let said = std::fs::read_to_string(&log).map_err(Error::io(&log))?;
    assert!(said.contains("in the place of [method]: RewardWeighted { kl_coef: 0.01 }"), "{said}");
    Ok(())
}
