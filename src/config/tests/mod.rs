//! Every mistake in a configuration is one line: where it was made, key, value, remedy. And the reference is complete.

mod mistakes;
mod reference;
mod written;

use super::*;
use crate::flow::sde::SdeConfig;
use crate::pipeline::LoraSection;
use crate::reward::RewardSettings;
use crate::variants::{self, Variants};
use mistakes::{FILES, LORA, SETTINGS};
use std::collections::BTreeSet;
use toml::{Table, Value};

fn settings(set: &[&str]) -> Vec<String> {
    set.iter().map(|s| s.to_string()).collect()
}

/// A file with this text, in a folder that is made.
fn written(path: &Path, text: &str) -> PathBuf {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
    path.to_path_buf()
}

/// The one line of a refused configuration, which begins with `origin` and contains `parts`.
fn refused(file: Option<&Path>, set: &[&str], origin: &str, parts: &[&str]) {
    let line = match RunConfig::load(file, &settings(set)) {
        Err(Error::Usage(line)) => line,
        other => panic!("{set:?} {parts:?}: {other:?}"),
    };
    assert!(!line.contains('\n') && line.starts_with(origin), "{line}");
    parts.iter().for_each(|part| assert!(line.contains(part), "no {part:?} in\n{line}"));
    assert!(!["serde", "untagged", "struct", "usize", "u64", "f64"].iter().any(|word| line.contains(word)), "{line}");
}

#[test]
fn mistakes_in_settings_are_one_line_with_the_remedy() {
    for (set, parts) in SETTINGS {
        refused(None, set, "--set", parts);
    }
    let deep = format!("{}=1", vec!["run"; 30_000].join("."));
    refused(None, &[&deep], "--set run.run.run", &["...: a key of 30000 parts, and no key has more than 8"]);
}

#[test]
fn mistakes_in_a_file_are_one_line_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    for (text, parts) in FILES {
        let file = folder.path().join("mine.toml");
        std::fs::write(&file, text.replace('@', LORA)).unwrap();
        refused(Some(&file), &[], &format!("{}: ", file.display()), parts);
    }
    let none = folder.path().join("none.toml");
    refused(Some(&none), &[], &none.display().to_string(), &["cannot be read", "give a TOML file to --config"]);
    refused(
        Some(folder.path()),
        &[],
        &folder.path().display().to_string(),
        &["cannot be read", "is a folder, not a file"],
    );
}

#[test]
fn prompt_files_are_read_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&str, &str, &[&str]); 4] = [
        ("", "--set: data.train = ", &["no prompt in this file; write one prompt a line"]),
        ("\"417\" in red on yellow\na cat\n", "--set: data.train = ", &["\"a cat\"", "not of the form"]),
        ("\"417\" in red on red\n", "--set: data.train = ", &["red on red", "use "]),
        (
            "\"417\" in red on yellow\n",
            "the embedded configuration: batch.prompts = 8: data.train = ",
            &["holds 1 prompts; use at most 1"],
        ),
    ];
    for (text, origin, parts) in cases {
        let file = folder.path().join("prompts.txt");
        std::fs::write(&file, text).unwrap();
        refused(None, &[&format!("data.train={}", file.display())], origin, parts);
        let stage = format!("stage=[{{at_update=1, train={file:?}}}]");
        refused(None, &[&stage], &origin.replace("data.train", "stage[0].train"), parts);
    }
}

#[test]
fn a_mistake_is_told_of_where_it_was_made() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[optim]\nlr = 0\n[[reward]]\nname = \"ocr\"\n").unwrap();
    let origin = format!("{}: optim.lr = 0", file.path().display());
    refused(Some(file.path()), &["optim.lrs=1"], "--set: optim.lrs", &[]);
    refused(Some(file.path()), &["run.seed=7", "optim.eps=1e-6"], &origin, &[]);
    refused(None, &["sampler.steps=2"], "the embedded configuration: batch.timesteps = 4", &["sampler.steps = 2"]);
    RunConfig::load(Some(file.path()), &settings(&["optim.lr=1e-4"])).unwrap();
}

#[test]
fn files_that_only_training_needs_are_asked_for_later() {
    let config = RunConfig::load(None, &settings(&["reward.0.detector=none.onnx"])).unwrap();
    let line = config.check_files().unwrap_err().to_string();
    assert!(line.contains("reward[0].detector = ") && line.contains("launch/fetch-ocr.sh"), "{line}");
    let config = RunConfig::load(None, &settings(&["model.path=none.safetensors"])).unwrap();
    let line = config.check_files().unwrap_err().to_string();
    assert!(line.starts_with("model.path = \"none.safetensors\": there is nothing at this path; "), "{line}");
    assert!(line.ends_with("or name another place with --set model.path=PATH"), "{line}");
}

/// Every key that names a file to be read is found from the file that names it, through what it extends; what is written
/// and what `--set` names stay.
#[test]
fn files_are_found_beside_the_file_that_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| written(&folder.path().join(name), text);
    write("more/base.toml", "[data]\ntrain = \"../prompts/a.txt\"\neval = \"glyphs\"\n[run]\nout = \"runs/a\"\n");
    write("prompts/a.txt", "\"417\" in red on yellow\n");
    write("own/b.txt", "\"418\" in red on yellow\n");
    let mine = write(
        "own/mine.toml",
        "extends = \"../more/base.toml\"\n[model]\nkind = \"sd35-medium\"\npath = \"/models/sd35\"\n\
         transformer = \"t\"\ntrainable = \"lora\"\n[model.lora]\npath = \"../lora\"\n[batch]\nprompts = 1\n\
         [[reward]]\nname = \"ocr\"\ndetector = \"d\"\n[[reward]]\nname = \"aesthetic\"\npath = \"c\"\n\
         tokenizer = \"../k\"\npredictor = \"p\"\n[[stage]]\nat_update = 2\ntrain = \"b.txt\"\n",
    );
    let config = RunConfig::load(Some(&mine), &[]).unwrap();
    let at = |name: &str| folder.path().join(name);
    assert_eq!(Path::new(&config.data.train), at("prompts/a.txt"));
    assert_eq!((config.data.eval.as_str(), config.run.out.as_path()), ("glyphs", Path::new("runs/a")));
    assert_eq!(config.model.prompt_cache, Path::new("cache/prompts"));
    assert_eq!(config.model.path.as_deref(), Some(Path::new("/models/sd35")));
    let [RewardSettings::Ocr(ocr), RewardSettings::Aesthetic(aesthetic)] =
        [&config.reward[0].settings, &config.reward[1].settings]
    else {
        panic!("{:?}", config.reward)
    };
    for (path, name) in [
        (&config.model.transformer, "own/t"),
        (&config.model.lora.path, "lora"),
        (&ocr.detector, "own/d"),
        (&aesthetic.tokenizer, "k"),
        (&Some(aesthetic.path.clone()), "own/c"),
        (&Some(aesthetic.predictor.clone()), "own/p"),
        (&config.stage[0].train.as_ref().map(PathBuf::from), "own/b.txt"),
    ] {
        assert_eq!(*path, Some(at(name)), "{name}");
    }
    let prompts = "Cargo.toml"; // of the working folder
    let set = settings(&[&format!("data.eval={prompts}"), "model.path=m"]);
    let config = RunConfig::load_for(Use::Model, Some(&mine), &set).unwrap();
    assert_eq!((config.data.eval.as_str(), config.model.path), (prompts, Some("m".into())));
}

#[test]
fn a_run_folder_remembers_where_files_are_and_can_be_moved() {
    let folder = tempfile::tempdir().unwrap();
    let [here, there] = ["here", "there"].map(|name| folder.path().join(name));
    for out in [&here, &there] {
        std::fs::create_dir_all(out).unwrap();
        std::fs::write(out.join("prompts.txt"), "\"417\" in red on yellow\n").unwrap();
    }
    let set = ["batch.prompts=1", "data.eval=src/config/tests/eval.txt", "model.path=assets/glyphs/base.safetensors"];
    let set = [settings(&set), vec![format!("data.train={}", here.join("prompts.txt").display())]].concat();
    let config = RunConfig::load_for(Use::Model, None, &set).unwrap();
    config.write(&here).unwrap();
    std::fs::rename(here.join(RUN_CONFIG), there.join(RUN_CONFIG)).unwrap();
    let moved = RunConfig::load_for(Use::Model, Some(&there.join(RUN_CONFIG)), &[]).unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    assert_eq!(Path::new(&moved.data.train), there.join("prompts.txt"), "in the run folder");
    assert_eq!(Path::new(&moved.data.eval), root.join("src/config/tests/eval.txt"), "outside");
    assert_eq!(moved.model.path, Some(root.join("assets/glyphs/base.safetensors")));
    assert_eq!(moved.run.out, root.join("runs/glyphs"));
    assert_eq!(moved.digest().unwrap(), config.digest().unwrap(), "where files lie decides nothing");
    assert!(moved.changes_since(&config).unwrap().is_empty());
    let other = settings(&["model.path=other.safetensors"]);
    let other = RunConfig::load_for(Use::Model, Some(&there.join(RUN_CONFIG)), &other).unwrap();
    assert_eq!(other.changes_since(&config).unwrap(), ["model.path \"base.safetensors\" -> \"other.safetensors\""]);
    let sd35 = settings(&["model.kind=sd35-medium", "model.path=none", "reward.0.name=jpeg-compressibility"]);
    RunConfig::load_for(Use::Model, None, &sd35).unwrap().write(&there).unwrap();
    let cached = RunConfig::load_for(Use::Model, Some(&there.join(RUN_CONFIG)), &[]).unwrap();
    assert_eq!(cached.model.prompt_cache, root.join("cache/prompts"));
}

#[test]
fn a_file_may_extend_another() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| written(&folder.path().join(name), text);
    write("base.toml", "[optim]\nlr = 1e-5\neps = 1e-6\n[[reward]]\nname = \"ocr\"\n[[reward]]\nname = \"colour\"\n");
    write("more/middle.toml", "extends = \"../base.toml\"\n[run]\nseed = 3\n");
    let mine = write("mine.toml", "extends = \"more/middle.toml\"\n[optim]\nlr = 1e-3\n[[reward]]\nname = \"ocr\"\n");
    let config = RunConfig::load(Some(&mine), &settings(&["run.updates=7"])).unwrap();
    assert_eq!((config.optim.lr, config.optim.eps, config.run.seed, config.run.updates), (1e-3, 1e-6, 3, 7));
    assert_eq!(config.reward.len(), 1, "a list is replaced");

    let lost = write("lost.toml", "extends = \"none.toml\"\n");
    refused(
        Some(&lost),
        &[],
        &lost.display().to_string(),
        &["extends = ", "none.toml", "relative to this one's folder"],
    );
    let circle = write("circle.toml", "extends = \"circle.toml\"\n");
    refused(Some(&circle), &[], &circle.display().to_string(), &["is there a circle?"]);
    let odd = write("odd.toml", "extends = 3\n");
    refused(Some(&odd), &[], &odd.display().to_string(), &["extends = 3: must be a path in quotes"]);
}

#[test]
fn a_resolved_configuration_reads_back_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let set = settings(&[
        "method.name=advantage-flow",
        "method.gamma=1.1",
        "advantage.map=linear",
        "advantage.clip=1",
        "run.name=a \"b\"",
        "stage=[{at_update=3, weights={ocr=0.5}, train=\"glyphs-4\"}, {at_update=9, train=\"glyphs\"}]",
    ]);
    let config = RunConfig::load(None, &set).unwrap();
    let file = folder.path().join("config.toml");
    std::fs::write(&file, config.to_toml().unwrap()).unwrap();
    let again = RunConfig::load(Some(&file), &[]).unwrap();
    assert_eq!(config.to_toml().unwrap(), again.to_toml().unwrap());
    assert_eq!(config.digest().unwrap(), again.digest().unwrap());
}

#[test]
fn the_digest_is_of_what_decides_an_update() {
    let digest = |set: &[&str]| RunConfig::load(None, &settings(set)).unwrap().digest().unwrap();
    for same in ["run.updates=7", "run.out=elsewhere", "eval.prompts=3", "parallel.deadline_s=9", "log.level=debug"] {
        assert_eq!(digest(&[]), digest(&[same]), "{same}");
    }
    let stage = "stage=[{at_update=3, weights={ocr=0.5}}]";
    for other in ["run.seed=7", "optim.lr=1e-3", "batch.prompts=9", "reward.0.weight=2", "sampler.shift=1", stage] {
        assert_ne!(digest(&[]), digest(&[other]), "{other}");
    }
}

/// Every `section.key` of a table, list entries without their number.
fn keys(table: &Table) -> BTreeSet<String> {
    fn walk(value: &Value, path: &str, into: &mut BTreeSet<String>) {
        match value {
            Value::Table(t) => t.iter().for_each(|(key, value)| walk(value, &format!("{path}.{key}"), into)),
            Value::Array(list) if list.iter().any(Value::is_table) => list.iter().for_each(|v| walk(v, path, into)),
            _ => drop(into.insert(path.trim_start_matches('.').to_owned())),
        }
    }
    let mut all = BTreeSet::new();
    walk(&Value::Table(table.clone()), "", &mut all);
    all
}

/// A run with nothing but what must be given.
fn defaults() -> RunConfig {
    toml::from_str("[[reward]]\nname = \"ocr\"\n").unwrap()
}

fn keys_of<T: DeserializeOwned>() -> &'static [&'static str] {
    variants::fields::<T>().1
}

/// Every `section.key` that there is, as the sections' types name them.
fn known_keys() -> BTreeSet<String> {
    let methods = MethodConfig::NAMES.iter().map(|name| ("method", MethodConfig::keys(name)));
    let rewards = RewardSettings::NAMES.iter().map(|name| ("reward", RewardSettings::keys(name)));
    let sections = [
        ("run", keys_of::<RunSection>()),
        ("model", keys_of::<ModelConfig>()),
        ("model.lora", keys_of::<LoraSection>()),
        ("data", keys_of::<DataConfig>()),
        ("batch", keys_of::<BatchConfig>()),
        ("sampler", keys_of::<SamplerConfig>()),
        ("sampler.sde", keys_of::<SdeConfig>()),
        ("eval", keys_of::<EvalConfig>()),
        ("method", &["name"]),
        ("advantage", keys_of::<AdvantageConfig>()),
        ("reward", &["name", "weight"]),
        ("stage", keys_of::<StageConfig>()),
        ("old_policy", keys_of::<OldPolicyConfig>()),
        ("ema", keys_of::<EmaConfig>()),
        ("optim", keys_of::<OptimConfig>()),
        ("parallel", keys_of::<ParallelConfig>()),
        ("log", keys_of::<LogConfig>()),
    ];
    let all: Vec<(&str, &[&str])> = sections.into_iter().chain(methods).chain(rewards).collect();
    let of = |(section, keys): (&str, &[&str])| keys.iter().map(|key| format!("{section}.{key}")).collect::<Vec<_>>();
    let mut known: BTreeSet<String> = all.iter().copied().flat_map(of).collect();
    let sections: BTreeSet<&str> = all.iter().map(|(section, _)| *section).collect();
    for name in keys_of::<RunConfig>() {
        assert!(sections.contains(name), "{name}: a section whose keys are not known here");
    }
    known.retain(|key| !sections.contains(key.as_str()));
    known
}
