//! What is not finite is so on every rank, and leaves the weights alone.

mod failing_rewards;
mod overlap;

use super::*;
use crate::comm::ThreadGroup;
use crate::data::Prompt;
use crate::optim::{OldPolicySchedule, VECTORS};
use crate::params::Trainable;
use crate::pipeline::ModelConfig;
use crate::plan::Plan;
use crate::reward::Reward;
use crate::shard::Weights;
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Scores by the picture's mean, or not at all.
struct Faulty(Arc<AtomicBool>);

impl Reward for Faulty {
    fn name(&self) -> &str {
        "faulty"
    }

    fn score(&self, images: &Tensor, _: &[Prompt]) -> Result<Vec<Option<f64>>> {
        let means = images.flatten_from(1)?.mean(1)?.to_vec1::<f32>()?;
        Ok(means.into_iter().map(|m| Some(if self.0.load(SeqCst) { f64::NAN } else { m.into() })).collect())
    }
}

/// Scores an image by its place in the call and its picture's mean.
pub(super) struct By(pub fn(usize, f64) -> f64);

impl By {
    /// By the picture's mean.
    pub const MEAN: Self = Self(|_, mean| mean);
    /// Not at all.
    pub const NAN: Self = Self(|_, _| f64::NAN);
    /// Finite, with distances that are not.
    pub const HUGE: Self = Self(|place, _| if place.is_multiple_of(2) { 1e308 } else { -1e308 });

    pub fn alone(self) -> Rewards {
        Arc::new([Box::new(self) as _])
    }
}

impl Reward for By {
    fn name(&self) -> &str {
        "by"
    }

    fn score(&self, images: &Tensor, _: &[Prompt]) -> Result<Vec<Option<f64>>> {
        let means = images.flatten_from(1)?.mean(1)?.to_vec1::<f32>()?;
        Ok(means.into_iter().enumerate().map(|(place, mean)| Some(self.0(place, mean.into()))).collect())
    }
}

/// Stands for a reward of this name where nothing but its weight is asked for.
struct Named(String);

impl Reward for Named {
    fn name(&self) -> &str {
        &self.0
    }

    fn score(&self, _: &Tensor, _: &[Prompt]) -> Result<Vec<Option<f64>>> {
        unreachable!("only a name")
    }
}

impl Trainer {
    /// Scores by these rewards from now on, of the weight 1 each.
    pub(super) fn score_by(&mut self, rewards: Rewards) -> Result<()> {
        let mut named = Vec::new();
        for reward in rewards.iter() {
            named.push(OwnReward::new(Named(reward.name().to_owned()), 1.0));
        }
        self.stages = Stages::new(&self.config, &named)?;
        self.rewards = rewards;
        Ok(())
    }
}

/// The embedded task in 2 x 3 images an iteration.
pub(super) fn small(settings: &[&str]) -> Result<RunConfig> {
    let small =
        ["batch.prompts=2", "batch.images_per_prompt=3", "batch.micro_batch=2", "batch.timesteps=1", "sampler.steps=2"];
    let set: Vec<String> = small.iter().chain(settings).map(|setting| setting.to_string()).collect();
    RunConfig::load(None, &set)
}

/// A run of 2 x 3 images on the ranks of `world`, and the switch of its reward's fault.
pub(super) fn trainer(world: &World, settings: &[&str]) -> Result<(Trainer, Arc<AtomicBool>)> {
    let config = small(settings)?;
    let mut pipeline = Pipeline::load(&config.model, 1, &candle_core::Device::Cpu)?;
    let base = pipeline.take_base();
    let layout = Layout::new(&pipeline.model.specs(), config.model.trainable);
    let state = Sharded::new(&*base, &layout, config.parallel.shard, &*world.device)?;
    let old_is_policy = OldPolicySchedule::Linear.decay().eta(0) == 0.0;
    let policies =
        Policies::new(&*base, &pipeline.model.specs(), config.model.trainable, &state, old_is_policy, world)?;
    let fault = Arc::new(AtomicBool::new(false));
    let mut trainer = Trainer {
        world: world.clone(),
        stages: Stages::new(&config, &[])?,
        rewards: Rewards::default(),
        objective: config.objective(),
        batches: Batches::new(&config, config.objective().requirements().trajectory),
        config,
        pipeline,
        layout,
        state,
        policies,
        skipped: 0,
    };
    trainer.score_by(Arc::new([Box::new(Faulty(fault.clone())) as _]))?;
    Ok((trainer, fault))
}

pub(super) fn bits(trainer: &Trainer) -> Result<Vec<u32>> {
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
    let params = pipeline.params()?;
    let mut flat = params.flatten(&layout)?.to_vec1::<f32>()?;
    flat.iter_mut().for_each(change);
    Ok(Rc::new(params.with_flat(&layout, &Tensor::from_vec(flat, layout.total, &candle_core::Device::Cpu)?)?))
}

#[test]
fn a_reward_or_a_sample_that_is_not_finite_on_one_rank_is_so_on_all() -> Result<()> {
    let messages = ThreadGroup::run(2, |world| {
        let (mut trainer, fault) = trainer(&world, &["optim.not_finite=stop"])?;
        let before = bits(&trainer)?;
        fault.store(world.rank() == 1, SeqCst);
        let reward = trainer.iteration(0, &mut |_| ()).expect_err("a reward is NaN").to_string();
        fault.store(false, SeqCst);
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

/// Whatever the map: every rank has the same numbers and finds the same fault in them.
#[test]
fn an_advantage_that_is_not_finite_is_so_on_all_ranks() -> Result<()> {
    for method in [&["method.name=advantage-flow"][..], &["method.form=robust", "advantage.map=tempered-softmax"]] {
        let messages = ThreadGroup::run(2, |world| {
            let (mut trainer, _) = trainer(&world, method)?;
            trainer.score_by(if world.rank() == 1 { By::HUGE } else { By::MEAN }.alone())?;
            let before = bits(&trainer)?;
            let error = trainer.iteration(0, &mut |_| ()).expect_err("no advantage is a number");
            assert!(matches!(error, Error::NotFinite(_)), "{error}");
            assert!(bits(&trainer)? == before, "the weights were touched");
            trainer.score_by(By::MEAN.alone())?;
            assert_eq!(trainer.iteration(1, &mut |_| ())?.len(), 1);
            trainer.check_replicas()?;
            Ok(error.to_string())
        })?;
        assert_eq!(messages[0], messages[1]);
        assert!(messages[0].starts_with("normalised reward "), "{}", messages[0]);
    }
    Ok(())
}

#[test]
fn a_gradient_that_is_not_finite_is_left_out_and_counted() -> Result<()> {
    ThreadGroup::run(2, |world| {
        let (mut trainer, _) = trainer(&world, &["optim.not_finite=skip"])?;
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

/// Rewards that are equal but for rounding leave master weights, moments, old policy and EMA to the bit, where nothing else
/// moves them: at the policy that sampled, and in a second update, whose old policy is a network of its own.
#[test]
fn no_signal_is_no_step() -> Result<()> {
    let methods: [&[&str]; 11] = [
        &["method.form=released"],
        &["method.form=released", "advantage.map=gated-softmax"],
        &["method.form=paper"],
        &["method.form=exact", "advantage.map=softmax"],
        &["method.form=robust", "advantage.map=tempered-softmax"],
        &["method.name=advantage-flow"],
        &["method.name=advantage-flow", "method.gamma=1.1", "advantage.map=linear"],
        &["method.name=diffusion-nft"],
        &["method.name=diffusion-nft", "method.mix=0.1"],
        &["method.name=flow-grpo", "sampler.solver=sde"],
        &["method.name=awm", "batch.updates_per_iteration=1"],
    ];
    let still = ["method.kl_coef=0", "optim.weight_decay=0", "old_policy.rate=0.3", "batch.updates_per_iteration=2"];
    for method in methods {
        ThreadGroup::run(1, |world| {
            let (mut trainer, _) = trainer(&world, &[&still, method].concat())?;
            trainer.score_by(By(|place, _| if place.is_multiple_of(2) { 0.1 + 0.2 } else { 0.3 }).alone())?;
            let before = bits(&trainer)?;
            let updates = trainer.iteration(0, &mut |_| ())?;
            assert_eq!(updates.last().and_then(|update| update.get("grad_norm")), Some(0.0), "{method:?}");
            assert!(bits(&trainer)? == before, "{method:?} has moved something");
            Ok(())
        })?;
    }
    Ok(())
}

/// Every rank's state after two iterations on 4 x 2 images: master parameters, moments, old policy and EMA, joined.
fn trained(ranks: usize, settings: &[&str]) -> Result<BTreeMap<String, Vec<f32>>> {
    let settings =
        [&["batch.prompts=4", "batch.images_per_prompt=2", "batch.micro_batch=1", "old_policy.rate=0.3"], settings]
            .concat();
    let shards = ThreadGroup::run(ranks, |world| {
        let (mut trainer, _) = trainer(&world, &settings)?;
        trainer.iteration(0, &mut |_| ())?;
        trainer.iteration(1, &mut |_| ())?;
        trainer.check_replicas()?;
        let total = trainer.layout.total;
        Ok((trainer.state.snapshot()?, total))
    })?;
    let mut joined = BTreeMap::new();
    for (shard, total) in shards {
        for (name, values) in shard.vectors {
            let whole = joined.entry(name).or_insert_with(|| vec![0.0; total]);
            let places = shard.ranges.iter().cloned().flatten();
            places.zip(values).for_each(|(place, value)| whole[place] = value);
        }
    }
    Ok(joined)
}

/// L2 norm of the difference by that of `b`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b)))
}

/// What is shared out, and on how many ranks.
type Ways<'a> = &'a [(&'a str, &'a [usize])];

/// Whatever is shared out among however many ranks. DiffusionNFT asks for old policy and base model at once; on 8 ranks
/// an update of two has ranks without a point.
#[test]
fn every_way_of_sharing_gives_the_same_parameters() -> Result<()> {
    const NFT: &[&str] = &["method.name=diffusion-nft", "batch.updates_per_iteration=2"];
    let all: &[usize] = &[1, 2, 4, 8];
    let cases: [(&[&str], &str, Ways); 4] = [
        (&[], "full", &[("none", all), ("optimizer", all), ("full", all)]),
        (&[], "lora", &[("none", &[4]), ("optimizer", &[2]), ("full", all)]),
        (NFT, "full", &[("full", &[1, 2, 8])]),
        (NFT, "lora", &[("optimizer", &[4]), ("full", &[4])]),
    ];
    for (method, trainable, ways) in cases {
        let trainable = format!("model.trainable={trainable}");
        let run = |ranks, shard: &str| {
            let shard = format!("parallel.shard={shard}");
            trained(ranks, &[method, &[trainable.as_str(), shard.as_str()]].concat())
        };
        let one = run(1, "none")?;
        for (shard, ranks) in ways.iter().flat_map(|(shard, all)| all.iter().map(move |ranks| (shard, *ranks))) {
            let other = run(ranks, shard)?;
            let distances = ["policy", "old", "ema"].map(|name| distance(&other[name], &one[name]));
            let limit = if ranks == 1 { 0.0 } else { 1e-6 };
            let most = distances.into_iter().fold(0.0, f64::max);
            assert!(most <= limit, "{method:?} {trainable}, {shard} on {ranks} ranks: {most:e}");
        }
    }
    Ok(())
}

/// An update with a model in bf16, of f32 master parameters, is that of f32 but for the rounding of the model: AdamW's
/// first steps have the gradients' signs, so the noise of the small gradients shows in full.
#[test]
fn a_model_in_bf16_takes_the_updates_of_f32() -> Result<()> {
    for (shard, trainable) in [("none", "full"), ("full", "full"), ("full", "lora")] {
        let (shard, trainable) = (format!("parallel.shard={shard}"), format!("model.trainable={trainable}"));
        let settings = [shard.as_str(), trainable.as_str()];
        let update = |dtype: &str| -> Result<Vec<f32>> {
            let updates = ThreadGroup::run(2, |world| {
                let (mut trainer, _) = trainer(&world, &[&settings[..], &[&format!("model.dtype={dtype}")]].concat())?;
                let before = trainer.state.gather_policy(&*world.device)?;
                trainer.iteration(0, &mut |_| ())?;
                Ok((trainer.state.gather_policy(&*world.device)? - before)?.to_vec1::<f32>()?)
            })?;
            Ok(updates.into_iter().next().unwrap_or_default())
        };
        let (wide, narrow) = (update("f32")?, update("bf16")?);
        let distance = distance(&narrow, &wide);
        // 0.247 with all parameters trained, 0.254 with adapters.
        assert!((0.22..0.28).contains(&distance), "{settings:?}: {distance}");
    }
    Ok(())
}

/// Calls and bytes, of every way of sharing and with every set of parameters that an objective may ask for.
#[test]
fn what_ranks_send_is_what_the_plan_says() -> Result<()> {
    const TWICE: &str = "batch.updates_per_iteration=2";
    for shard in ["none", "optimizer", "full"] {
        for settings in [
            &["model.trainable=full"][..],
            &["model.trainable=lora", "model.dtype=bf16", TWICE],
            &["method.name=diffusion-nft", "parallel.checkpoint_activations=2", TWICE],
            &["method.name=diffusion-nft", "old_policy.rate=0.0", TWICE],
        ] {
            ThreadGroup::run(2, |world| {
                let shard = format!("parallel.shard={shard}");
                let (mut trainer, _) = trainer(&world, &[settings, &[shard.as_str()]].concat())?;
                let plan = Plan::of(&trainer.config, 2)?.iteration_sent();
                // In the first iteration the old policy is the policy, whatever the plan.
                trainer.iteration(0, &mut |_| ())?;
                let before = (world.calls(), world.sent());
                trainer.iteration(1, &mut |_| ())?;
                let sent = (world.calls() - before.0, world.sent() - before.1);
                assert_eq!(sent, (plan.calls as u64, plan.bytes as u64), "{shard} {settings:?}");
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn replicas_that_differ_are_named() -> Result<()> {
    ThreadGroup::run(3, |world| {
        let (mut trainer, _) = trainer(&world, &["optim.not_finite=stop"])?;
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

/// Master parameters, moments, old policy and EMA: where nothing is shared out all are there on every rank, and one bit is
/// told; where they are shared out, ranks hold different parts and are not compared.
#[test]
fn state_that_differs_is_told_where_every_rank_has_all_of_it() -> Result<()> {
    ThreadGroup::run(3, |world| {
        for shard in ["none", "optimizer", "full"] {
            let (mut trainer, _) = trainer(&world, &[&format!("parallel.shard={shard}")])?;
            trainer.iteration(0, &mut |_| ())?;
            let calls = world.calls();
            trainer.check_replicas()?;
            assert_eq!(world.calls(), calls, "{shard}: nothing is gathered to be compared");
            let vectors = trainer.state.replicated()?;
            assert_eq!(vectors.len(), if shard == "none" { VECTORS.len() } else { 0 });
            for vector in vectors {
                let fault = |rank| if world.rank() == rank { flip(&vector, 12345, 0) } else { Ok(()) };
                fault(1)?;
                let error = trainer.check_replicas().expect_err("rank 1 differs").to_string();
                assert!(error.starts_with("update 1: the masters, moments or EMA of rank 1 differ from"), "{error}");
                fault(1)?;
                trainer.check_replicas()?;
            }
            if shard == "optimizer" && world.rank() == 1 {
                flip(&trainer.state.policy()?, 12345, 0)?;
            }
            trainer.check_replicas()?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Flips a bit of one element, in place.
pub(super) fn flip(vector: &Tensor, place: usize, bit: u32) -> Result<()> {
    let value = vector.narrow(0, place, 1)?.to_vec1::<f32>()?[0];
    let changed = Tensor::new(&[f32::from_bits(value.to_bits() ^ 1 << bit)], vector.device())?;
    Ok(vector.slice_set(&changed, 0, place)?)
}

/// Guidance away from the prompt itself leads nowhere: samples and losses are those without guidance, and gradients, which
/// do not go through the negative velocity, are `guidance` times as long.
#[test]
fn rollouts_and_training_steps_are_guided_away_from_a_prompts_own_negative() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let first = |negative: &dyn Fn(&str) -> String, guidance: f64| -> Result<Vec<f64>> {
        let lines = ["\"417\" in red on yellow", "\"052\" in blue on white"]
            .map(|prompt| serde_json::json!({"prompt": prompt, "negative_prompt": negative(prompt)}).to_string());
        let file = folder.path().join("prompts");
        std::fs::write(&file, lines.join("\n")).unwrap();
        let data = format!("data.train={}", file.display());
        let guidance = format!("sampler.guidance={guidance}");
        let settings = ["method.name=flow-grpo", "sampler.solver=sde", "optim.clip=1e9", &data, &guidance];
        let updates = trainer(&World::solo(), &settings)?.0.iteration(0, &mut |_| ())?;
        let names = ["reward.faulty.mean", "loss", "grad_norm"];
        Ok(names.map(|name| updates[0].get(name).unwrap_or(f64::NAN)).to_vec())
    };
    let (plain, same) = (first(&str::to_owned, 1.0)?, first(&str::to_owned, 3.0)?);
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-3 * b.abs().max(1e-3);
    assert!(
        close(same[0], plain[0]) && close(same[1], plain[1]) && close(same[2], 3.0 * plain[2]),
        "{same:?} {plain:?}"
    );
    let other = first(&|_| "\"8\" in black on sky".to_owned(), 3.0)?;
    assert!(!close(other[0], plain[0]), "{other:?} {plain:?}");
    Ok(())
}
