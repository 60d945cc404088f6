//! What is written is what runs: nothing of it is left to the program that reads it.

use super::*;
use crate::advantage::Map;
use crate::params::Trainable;

/// The configurations of runs in configs/.
fn presets() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let other =
                name.starts_with("pretrain") || name == "base.toml" || path.parent().unwrap().ends_with("machines");
            match path.is_dir() {
                true => folders.push(path),
                false if name.ends_with(".toml") && !other => found.push(path),
                false => {}
            }
        }
    }
    found.retain(|path| std::fs::read_to_string(path).unwrap().contains("[[reward]]")); // methods/ are parts of others
    found.sort();
    found
}

/// What a configuration comes to, by what runs ask it.
fn runs(config: &RunConfig) -> String {
    let map = config.advantage.resolve(&config.method);
    let used = map.map != Map::Linear;
    let map = (map.aggregate, map.normaliser, map.clip, map.map, used.then_some((map.temperature, map.map_clip)));
    let sampled = config.sampler.sigmas();
    let stochastic = config.sampler.sde.window(config.sampler.steps, 0);
    let samplers = (config.sampler.solver, sampled, (config.sampler.solver == Solver::Sde).then_some(stochastic));
    let trained = (config.timesteps(), config.old_policy_decay(), config.objective(), config.model.adapters());
    let rest = (&config.batch, &config.eval, &config.ema, &config.optim, &config.parallel, config.stages().len());
    let rest = (rest.0.prompts, rest.0.images_per_prompt, rest.0.micro_batch, rest.1, rest.2, rest.3, rest.4, rest.5);
    let rewards: Vec<_> = config.reward.iter().map(|reward| (reward.label(), reward.kind(), reward.weight)).collect();
    format!("{map:?} {samplers:?} {trained:?} {rest:?} {rewards:?} {:?} {}", config.log, config.run.seed)
}

#[test]
fn every_preset_is_written_as_it_runs() {
    let presets = presets();
    assert!(presets.len() > 30, "{presets:?}");
    for preset in presets {
        let folder = tempfile::tempdir().unwrap();
        let config = RunConfig::load_for(Use::Model, Some(&preset), &[]).unwrap();
        config.write(folder.path()).unwrap();
        let file = folder.path().join(RUN_CONFIG);
        let text = std::fs::read_to_string(&file).unwrap();
        let again = RunConfig::load_for(Use::Model, Some(&file), &[]).unwrap();
        assert_eq!(runs(&again), runs(&config), "{preset:?}");
        assert_eq!(again.digest().unwrap(), config.digest().unwrap(), "{preset:?}");
        assert!(again.changes_since(&config).unwrap().is_empty(), "{preset:?}");
        again.write(folder.path()).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), text, "{preset:?}");

        let written = keys(&text.parse().unwrap());
        let missing: Vec<String> = applicable(&config).difference(&written).cloned().collect();
        assert!(missing.is_empty(), "{preset:?}: lacks {missing:?}");
        let idle: Vec<String> = written.difference(&applicable(&config)).cloned().collect();
        assert!(idle.is_empty(), "{preset:?}: {idle:?} have no effect");
    }
}

/// Of all keys, those that have an effect beside the values of the others.
fn applicable(config: &RunConfig) -> BTreeSet<String> {
    let mut known = known_keys();
    let mut without = |keys: &[&str]| {
        known.retain(|known| !keys.iter().any(|key| known == key || known.starts_with(&format!("{key}."))))
    };
    let lists = ["method", "reward", "stage"];
    without(&lists);
    if config.model.kind == ModelConfig::default().kind {
        let sd35 = ["transformer", "resolution", "t5_tokens", "prompt_cache", "vae_dtype"];
        without(&sd35.map(|key| format!("model.{key}")).each_ref().map(String::as_str));
    }
    if config.model.trainable == Trainable::Full {
        without(&["model.lora"]);
    }
    if config.sampler.solver != Solver::Sde {
        without(&["sampler.sde"]);
    }
    if config.advantage.resolve(&config.method).map == Map::Linear {
        without(&["advantage.temperature", "advantage.map_clip"]);
    }
    if PromptSet::is_embedded(&config.data.train) && PromptSet::is_embedded(&config.data.eval) {
        without(&["data.format"]);
    }
    // Nothing is meant where these are left out: the model that the program holds, its own transformer, random adapters,
    // and a precision by the device.
    let left_out = [
        ("model.path", config.model.path.is_none()),
        ("model.transformer", config.model.transformer.is_none()),
        ("model.vae_dtype", config.model.vae_dtype.is_none()),
        ("model.lora.path", config.model.lora.path.is_none()),
    ];
    left_out.iter().filter(|(_, left_out)| *left_out).for_each(|(key, _)| without(&[key]));
    known.extend(["method.name", "reward.name", "reward.weight"].map(str::to_owned));
    let mut method = config.method.clone();
    method.resolve();
    known.extend(method.table().unwrap().keys().map(|key| format!("method.{key}")));
    known.extend(config.reward.iter().flat_map(|reward| {
        reward.settings.table().unwrap().into_iter().map(|(key, _)| format!("reward.{key}")).collect::<Vec<_>>()
    }));
    let stages: Table = [("stage".to_owned(), Value::try_from(&config.stage).unwrap())].into_iter().collect();
    known.extend(keys(&stages).into_iter().filter(|key| key != "stage"));
    known
}

#[test]
fn keys_that_count_for_nothing_decide_nothing() {
    let load = |set: &[&str]| RunConfig::load(None, &settings(set)).unwrap();
    let plain = load(&[]);
    for idle in [
        &["sampler.sde.noise_level=0.3"][..],
        &["model.lora.rank=4"],
        &["model.resolution=256"],
        &["data.format=text"],
        &["method.variant=released", "old_policy.rate=0.001", "batch.timesteps=4", "sampler.shift=3"],
        &["advantage.clip=5", "advantage.temperature=1"],
    ] {
        let config = load(idle);
        assert_eq!(config.to_toml().unwrap(), plain.to_toml().unwrap(), "{idle:?}");
        assert_eq!(config.digest().unwrap(), plain.digest().unwrap(), "{idle:?}");
    }
    let evaluated = load(&["eval.solver=sde"]).to_toml().unwrap();
    assert!(evaluated.contains("[sampler.sde]") && !evaluated.contains("window"), "{evaluated}");
    let server = |more: &str| load(&[&format!("reward=[{{name=\"remote\", url=\"http://a:1\", reward=\"b\"{more}}}]")]);
    let (here, there) = (server(""), server(", batch=3, connections=1"));
    assert_eq!(here.digest().unwrap(), there.digest().unwrap());
    assert_ne!(here.to_toml().unwrap(), there.to_toml().unwrap());
    assert_ne!(here.digest().unwrap(), server(", on_failure=\"drop\"").digest().unwrap());
}

/// A run folder of before: keys that had no effect, and none of those that were left to the program.
#[test]
fn a_run_folder_of_before_has_the_same_configuration() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoint_format_2");
    let earlier = RunConfig::of_run_folder(&fixture).unwrap();
    let now = RunConfig::load_for(Use::Model, Some(&fixture.join(RUN_CONFIG)), &[]).unwrap();
    assert!(now.changes_since(&earlier).unwrap().is_empty());
    let other = settings(&["method.kl_coef=0.5"]);
    let other = RunConfig::load_for(Use::Model, Some(&fixture.join(RUN_CONFIG)), &other).unwrap();
    assert_eq!(other.changes_since(&earlier).unwrap(), ["method.kl_coef 0.0001 -> 0.5"]);
    let folder = tempfile::tempdir().unwrap();
    let before =
        "[[reward]]\nname = \"ocr\"\n[method]\nname = \"diffusion-nft\"\nmix = 0.1\n[old_policy]\nmost = 0.3\n";
    std::fs::write(folder.path().join(RUN_CONFIG), before).unwrap();
    let before = RunConfig::of_run_folder(folder.path()).unwrap();
    assert_eq!((before.old_policy.max, before.method.kind().name()), (Some(0.3), "diffusion-nft"));
}
