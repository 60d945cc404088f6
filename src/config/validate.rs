//! What a configuration must fulfil beyond its types. Each problem is one line: key, value, remedy.

use super::{RunConfig, Use};
use crate::checks::{Check, LARGEST_COUNT, count, fraction, not_negative, positive, text, within};
use crate::data::{PromptSet, Split};
use crate::error::Error;
use crate::flow::Solver;
use crate::reward::{OcrConfig, RewardConfig, RewardSettings};
use std::path::Path;
use tracing_subscriber::EnvFilter;

pub(super) fn check(config: &RunConfig, purpose: Use) -> Check {
    run(config)?;
    samplers(config)?;
    batch(config)?;
    method(config)?;
    rewards(config)?;
    stages(config)?;
    optim(config)?;
    model(config)?;
    if purpose == Use::Training {
        run_folder(&config.run.out)?;
        train_prompts(config)?;
    }
    if purpose != Use::Model {
        eval_prompts(config)?;
    }
    Ok(())
}

fn run(config: &RunConfig) -> Check {
    let r = &config.run;
    within("run.updates", r.updates, 1, i64::MAX as u64)?;
    count("run.keep_last", r.keep_last)?;
    within("run.seed", r.seed, 0, i64::MAX as u64)?;
    within("eval.seed", config.eval.seed, 0, i64::MAX as u64)?;
    if r.out.as_os_str().is_empty() {
        return Err("run.out = \"\": name a folder, such as \"runs/first\"".into());
    }
    within("parallel.deadline_s", config.parallel.deadline_s, 1, LARGEST_COUNT)?;
    let level = &config.log.level;
    let levels = ["error", "warn", "info", "debug", "trace"];
    // A word that is no level would be taken as the name of a module.
    if !level.contains('=') && !levels.contains(&level.as_str()) || EnvFilter::builder().parse(level).is_err() {
        return Err(format!("log.level = {level:?}: must be one of {}", levels.join(", ")));
    }
    Ok(())
}

fn run_folder(out: &Path) -> Check {
    match super::file_in_the_way(out) {
        None => Ok(()),
        Some(file) => {
            Err(format!("run.out = {out:?}: {} is a file; name a folder, such as \"runs/first\"", file.display()))
        }
    }
}

fn batch(config: &RunConfig) -> Check {
    let b = &config.batch;
    count("batch.prompts", b.prompts)?;
    if b.images_per_prompt < 2 {
        return Err(format!(
            "batch.images_per_prompt = {}: a group needs at least 2 images to compare; use 2 or more (papers: 24)",
            b.images_per_prompt
        ));
    }
    count("batch.images_per_prompt", b.images_per_prompt)?;
    count("batch.micro_batch", b.micro_batch)?;
    count("batch.updates_per_iteration", b.updates_per_iteration)?;
    if b.updates_per_iteration > b.images_per_prompt {
        return Err(format!(
            "batch.updates_per_iteration = {}: each update takes its share of every group's {} images; use at most {}",
            b.updates_per_iteration, b.images_per_prompt, b.images_per_prompt
        ));
    }
    match b.timesteps {
        Some(0) => Err("batch.timesteps = 0: an image is trained at 1 timestep at least; use 1 or more".into()),
        Some(t) if t > config.sampler.steps => Err(format!(
            "batch.timesteps = {t}: the rollout has sampler.steps = {}; use at most that",
            config.sampler.steps
        )),
        _ => Ok(()),
    }
}

fn samplers(config: &RunConfig) -> Check {
    count("sampler.steps", config.sampler.steps)?;
    positive("sampler.shift", config.sampler.shift())?;
    not_negative("sampler.guidance", config.sampler.guidance)?;
    count("eval.steps", config.eval.steps)?;
    not_negative("eval.guidance", config.eval.guidance)?;
    count("eval.images_per_prompt", config.eval.images_per_prompt)?;
    let (sde, steps) = (&config.sampler.sde, config.sampler.steps);
    positive("sampler.sde.noise_level", sde.noise_level)?;
    within("sampler.sde.first", sde.first as u64, 0, steps as u64 - 1)?;
    within("sampler.sde.window", sde.count(steps) as u64, 1, (steps - sde.first) as u64)?;
    let end = sde.first + sde.window.unwrap_or(1);
    if config.eval.solver == Solver::Sde && config.eval.steps < end {
        return Err(format!(
            "eval.steps = {}: eval.solver = \"sde\" takes the stochastic steps of [sampler.sde], which go up to step {end}; \
             use at least {end}, or eval.solver = \"euler\"",
            config.eval.steps
        ));
    }
    Ok(())
}

fn method(config: &RunConfig) -> Check {
    config.advantage.check()?;
    config.method.check(&config.advantage.resolve(&config.method))?;
    requirements(config)
}

/// What the objective requires of the rollouts, they must have.
fn requirements(config: &RunConfig) -> Check {
    let (name, sampler) = (config.method.kind().name(), &config.sampler);
    let updates = config.batch.updates_per_iteration;
    let needs = config.objective().requirements();
    if needs.trajectory && sampler.solver != Solver::Sde {
        return Err(format!(
            "method.name = {name:?}: trains on the steps of stochastic rollouts, and sampler.solver = {}; set sampler.solver = \
             \"sde\"",
            text(sampler.solver)?
        ));
    }
    let window = sampler.sde.count(sampler.steps);
    if needs.trajectory && config.timesteps() > window {
        return Err(format!(
            "batch.timesteps = {}: only {window} steps of a rollout are stochastic; use at most that, or a wider \
             sampler.sde.window",
            config.timesteps()
        ));
    }
    if needs.single_update && updates > 1 {
        return Err(format!(
            "batch.updates_per_iteration = {updates}: {name}'s ratio is to the policy that sampled, so it takes one update \
             an iteration; set it to 1"
        ));
    }
    Ok(())
}

fn rewards(config: &RunConfig) -> Check {
    if config.reward.is_empty() {
        return Err("reward: none is given; add [[reward]] with name = \"ocr\"".into());
    }
    for (i, r) in config.reward.iter().enumerate() {
        r.check(config.parallel.deadline_s).map_err(|problem| format!("reward[{i}].{problem}"))?;
        if config.reward[..i].iter().any(|earlier| earlier.label() == r.label()) {
            let name = text(r.label())?;
            return Err(format!("reward[{i}].name = {name}: is named twice; name it once, with one weight"));
        }
    }
    if config.reward.iter().all(|r| r.weight == 0.0) {
        return Err("reward: every weight = 0, so there is nothing to learn; give one a weight, such as 1.0".into());
    }
    Ok(())
}

fn stages(config: &RunConfig) -> Check {
    let rewards: Vec<&str> = config.reward.iter().map(RewardConfig::label).collect();
    let updates = config.batch.updates_per_iteration;
    let resolved = config.stages();
    for (i, (stage, pair)) in config.stage.iter().zip(resolved.windows(2)).enumerate() {
        let (before, now) = (&pair[0], &pair[1]);
        let at = |key: &str| format!("stage[{i}].{key}");
        within(&at("at_update"), stage.at_update, 1, i64::MAX as u64)?;
        if now.first_iteration(updates) <= before.first_iteration(updates) {
            return Err(format!(
                "stage[{i}].at_update = {}: the stage before it begins at {} and would have no iteration of its own \
                 (batch.updates_per_iteration = {updates}); use {} or more",
                stage.at_update,
                before.at_update,
                before.first_iteration(updates) * updates as u64 + 1
            ));
        }
        if stage.train.is_none() && stage.weights.is_empty() {
            return Err(format!("stage[{i}]: changes nothing; give it weights = {{ {} = 1.0 }} or train", rewards[0]));
        }
        for (name, weight) in &stage.weights {
            let key = at(&format!("weights.{name}"));
            if !rewards.contains(&name.as_str()) {
                return Err(format!("{key} = {weight}: the run has no such reward; it has {}", rewards.join(", ")));
            }
            if !weight.is_finite() {
                return Err(format!("{key} = {weight}: must be a finite number, such as 1.0"));
            }
        }
        if now.weights.values().all(|&weight| weight == 0.0) {
            return Err(format!(
                "stage[{i}].weights: every weight = 0, so there is nothing to learn; give one a weight, such as 1.0"
            ));
        }
    }
    Ok(())
}

fn optim(config: &RunConfig) -> Check {
    let o = &config.optim;
    positive("optim.lr", o.lr)?;
    positive("optim.eps", o.eps)?;
    positive("optim.clip", o.clip)?;
    not_negative("optim.weight_decay", o.weight_decay)?;
    fraction("optim.betas[0]", o.betas.0)?;
    fraction("optim.betas[1]", o.betas.1)?;
    fraction("ema.decay", config.ema.decay)?;
    if let Some(rate) = config.old_policy.rate {
        not_negative("old_policy.rate", rate)?;
    }
    config.old_policy.max.map_or(Ok(()), |max| fraction("old_policy.max", max))
}

fn model(config: &RunConfig) -> Check {
    let m = &config.model;
    m.check()?;
    let without_detector = RewardSettings::Ocr(OcrConfig { detector: None });
    if !m.kind.draws_one_line()
        && let Some(i) = config.reward.iter().position(|r| r.settings == without_detector)
    {
        return Err(format!(
            "reward[{i}].name = \"ocr\": reads a whole picture as one line; add detector, which launch/fetch-ocr.sh \
             fetches"
        ));
    }
    Ok(())
}

fn train_prompts(config: &RunConfig) -> Check {
    let of_stages = config.stage.iter().enumerate().filter_map(|(i, stage)| Some((i, stage.train.as_ref()?)));
    let train = [("data.train".to_owned(), &config.data.train)].into_iter();
    for (key, source) in train.chain(of_stages.map(|(i, source)| (format!("stage[{i}].train"), source))) {
        let held = prompts(config, &key, source, Split::Train)?;
        let wanted = config.batch.prompts;
        if wanted > held {
            return Err(format!(
                "batch.prompts = {wanted}: {key} = {source:?} holds {held} prompts; use at most {held}, or more prompts"
            ));
        }
    }
    Ok(())
}

fn eval_prompts(config: &RunConfig) -> Check {
    prompts(config, "data.eval", &config.data.eval, Split::Eval).map(drop)
}

/// How many prompts a source holds, all of which can be used.
fn prompts(config: &RunConfig, key: &str, source: &str, split: Split) -> Result<usize, String> {
    let embedded = PromptSet::is_embedded(source);
    if !embedded && !Path::new(source).is_dir() {
        file(key, Path::new(source))?;
    }
    let named = |e: Error| format!("{key} = {source:?}: {e}");
    let set = PromptSet::load(source, split, config.data.format).map_err(named)?;
    // The prompts of an embedded set are of one task.
    let looked_at = if embedded { &set.prompts[..1] } else { &set.prompts };
    let mut texts = looked_at.iter().flat_map(|prompt| prompt.texts(true));
    texts.try_for_each(|text| config.model.kind.check_prompt(text)).map_err(named)?;
    Ok(set.len())
}

fn file(key: &str, path: &Path) -> Check {
    match path.is_file() {
        true => Ok(()),
        false => Err(format!(
            "{key} = {path:?}: there is no such file; give an existing one (in a file, relative to that file's folder; after \
             --set, to the current folder)"
        )),
    }
}
