//! A reward of your own: `cargo run --release --example own_reward`.
//!
//! Trains the embedded task for two updates to draw brighter images. Copy it, and write your own
//! `score`.

#![allow(clippy::print_stdout)] // a program for a terminal

use candle_core::Tensor;
use flowrl_dist::checkpoint::Resume;
use flowrl_dist::comm::World;
use flowrl_dist::config::RunConfig;
use flowrl_dist::data::Prompt;
use flowrl_dist::reward::Reward;
use flowrl_dist::train::{Outcome, Own, OwnReward, train};
use flowrl_dist::{Error, Result};
use std::path::Path;

/// How bright an image is, from 0 to 1.
struct Brightness;

impl Reward for Brightness {
    /// `reward.brightness.mean` is its mean in the metrics.
    fn name(&self) -> &str {
        "brightness"
    }

    /// One score per image of `images`, `[B, 3, H, W]` in [0, 1]; `None` would say that the prompt
    /// has nothing to score.
    fn score(&self, images: &Tensor, _prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
        let means = images.flatten_from(1)?.mean(1)?.to_vec1::<f32>()?; // [B]
        Ok(means.into_iter().map(|mean| Some(f64::from(mean))).collect())
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
    let own = Own { rewards: vec![OwnReward::new(Brightness, 1.0)], ..Own::default() };
    match train(&config, own, &Resume::Never, &World::solo())? {
        Outcome::Done(line) => Ok(line),
        Outcome::Interrupted(line) => Err(Error::Failed(line)),
    }
}

fn main() -> Result<()> {
    println!("{}", run(Path::new("runs/own_reward"))?);
    Ok(())
}

#[cfg(test)]
#[test]
fn it_trains_on_its_reward() -> Result<()> {
    let out = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
    let line = run(out.path())?;
    assert!(line.starts_with("held-out brightness 0.") && line.contains(" after 2 updates, "), "{line}");
    let file = out.path().join("metrics.jsonl");
    let metrics = std::fs::read_to_string(&file).map_err(Error::io(&file))?;
    assert_eq!(metrics.matches("\"reward.brightness.mean\"").count(), 2, "{metrics}");
    Ok(())
}
