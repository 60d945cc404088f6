//! What is not finite is so on every rank, and leaves the weights alone.

use super::*;
use crate::comm::ThreadGroup;
use crate::optim::OldPolicySchedule;
use crate::params::Trainable;
use crate::pipeline::ModelConfig;
use crate::shard::Weights;
use std::cell::Cell;
use std::rc::Rc;

/// Scores by the picture's mean, or not at all.
struct Faulty(Rc<Cell<bool>>);

impl Reward for Faulty {
    fn name(&self) -> &str {
        "faulty"
    }

    fn score(&self, images: &Tensor, _: &[Prompt]) -> Result<Vec<Option<f64>>> {
        let means = images.flatten_from(1)?.mean(1)?.to_vec1::<f32>()?;
        Ok(means.into_iter().map(|m| Some(if self.0.get() { f64::NAN } else { m.into() })).collect())
    }
}

/// A run of 2 x 3 images on the ranks of `world`, and the switch of its reward's fault.
fn trainer(world: &World, not_finite: &str) -> Result<(Trainer, Rc<Cell<bool>>)> {
    let set = [
        "batch.prompts=2",
        "batch.images_per_prompt=3",
        "batch.micro_batch=2",
        "batch.timesteps=1",
        "sampler.steps=2",
        &format!("optim.not_finite={not_finite}"),
    ];
    let config = RunConfig::load(None, &set.map(String::from))?;
    let mut pipeline = Pipeline::load(&config.model, 1, &candle_core::Device::Cpu)?;
    let base = std::mem::take(&mut pipeline.base);
    let layout = Layout::new(&pipeline.model.specs(), config.model.trainable);
    let state = Sharded::new(&base.flatten(&layout)?, &layout, config.parallel.shard, &*world.device)?;
    let old_is_policy = OldPolicySchedule::Linear.decay().eta(0) == 0.0;
    let policies = Policies::new(base, &pipeline.model.specs(), config.model.trainable, &state, old_is_policy, world)?;
    let fault = Rc::new(Cell::new(false));
    let trainer = Trainer {
        world: world.clone(),
        prompts: config.train_prompts()?,
        rewards: vec![Box::new(Faulty(fault.clone()))],
        objective: Objective::new(&config.method, &config.advantage.resolve(&config.method)),
        points: Points::new(&config),
        config,
        pipeline,
        layout,
        state,
        policies,
        skipped: 0,
    };
    Ok((trainer, fault))
}

fn bits(trainer: &Trainer) -> Result<Vec<u32>> {
    Ok(trainer.state.snapshot()?.vectors.into_values().flatten().map(f32::to_bits).collect())
}

/// The trained parameters with NaN in the place of all.
fn broken() -> Result<Rc<dyn Weights>> {
    changed(|value| *value = f32::NAN)
}

/// The base weights after `change` of each trained parameter.
fn changed(change: impl FnMut(&mut f32)) -> Result<Rc<dyn Weights>> {
    let pipeline = Pipeline::load(&ModelConfig::default(), 1, &candle_core::Device::Cpu)?;
    let layout = Layout::new(&pipeline.model.specs(), Trainable::Full);
    let mut flat = pipeline.base.flatten(&layout)?.to_vec1::<f32>()?;
    flat.iter_mut().for_each(change);
    Ok(Rc::new(pipeline.base.with_flat(&layout, &Tensor::from_vec(flat, layout.total, &candle_core::Device::Cpu)?)?))
}

#[test]
fn a_reward_or_a_sample_that_is_not_finite_on_one_rank_is_so_on_all() -> Result<()> {
    let messages = ThreadGroup::run(2, |world| {
        let (mut trainer, fault) = trainer(&world, "stop")?;
        let before = bits(&trainer)?;
        fault.set(world.rank() == 1);
        let reward = trainer.iteration(0, &mut |_| ()).expect_err("a reward is NaN").to_string();
        fault.set(false);
        let fine = trainer.policies.old.clone();
        if world.rank() == 1 {
            trainer.policies.old = broken()?;
        }
        let sample = trainer.iteration(1, &mut |_| ()).expect_err("a sample is NaN").to_string();
        assert!(bits(&trainer)? == before, "the weights were touched");
        trainer.policies.old = fine;
        assert_eq!(trainer.iteration(2, &mut |_| ())?.len(), 1);
        assert!(bits(&trainer)? != before, "an update changes the weights");
        Ok((reward, sample))
    })?;
    assert_eq!(messages[0], messages[1]);
    assert!(messages[0].0.starts_with("reward faulty: score NaN for image "), "{}", messages[0].0);
    assert!(messages[0].1.contains("is not finite: the policy has diverged"), "{}", messages[0].1);
    Ok(())
}

#[test]
fn a_gradient_that_is_not_finite_is_left_out_and_counted() -> Result<()> {
    ThreadGroup::run(2, |world| {
        let (mut trainer, _) = trainer(&world, "skip")?;
        let before = trainer.state.gather_policy(&*world.device)?.to_vec1::<f32>()?;
        let fine = trainer.policies.policy.clone();
        if world.rank() == 1 {
            trainer.policies.policy = broken()?;
        }
        assert!(trainer.iteration(0, &mut |_| ())?.is_empty(), "no update was taken");
        assert_eq!((trainer.state.update, trainer.skipped), (0, 1));
        assert!(trainer.state.gather_policy(&*world.device)?.to_vec1::<f32>()? == before);
        trainer.policies.policy = fine;
        let updates = trainer.iteration(1, &mut |_| ())?;
        assert_eq!((updates.len(), updates[0].get("skipped")), (1, Some(1.0)));
        Ok(())
    })?;
    Ok(())
}

#[test]
fn replicas_that_differ_are_named() -> Result<()> {
    ThreadGroup::run(3, |world| {
        let (mut trainer, _) = trainer(&world, "stop")?;
        trainer.check_replicas()?;
        if world.rank() == 2 {
            // One bit of one parameter.
            let mut place = 0;
            trainer.policies.old = changed(|value| {
                if place == 12345 {
                    *value = f32::from_bits(value.to_bits() ^ 1);
                }
                place += 1;
            })?;
        }
        let error = trainer.check_replicas().expect_err("rank 2 differs").to_string();
        assert!(error.contains("the parameters of rank 2 differ from rank 0's"), "{error}");
        Ok(())
    })?;
    Ok(())
}
