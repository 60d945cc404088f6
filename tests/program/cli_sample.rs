//! `sample` and `eval`: the base model, and a checkpoint of a small run.

use flowrl_dist::digest;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    run_in(Path::new("."), arguments)
}

/// The program, started in the folder `working`.
fn run_in(working: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flowrl-dist"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if ["OMPI_", "PMI", "SLURM_", "RUST_LOG"].iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command.current_dir(working).args(arguments).output().unwrap()
}

fn done(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(arguments: &[&str], part: &str) {
    let output = run(arguments);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
    assert!(error.contains(part), "no {part:?} in {error}");
}

const PROMPT: &str = "\"417\" in red on yellow";

/// Two updates of two images each; both sets of parameters differ from the base model's.
fn small_run(out: &str) {
    let set =
        ["run.updates=2", "run.eval_every=0", "batch.prompts=1", "batch.images_per_prompt=2", "batch.timesteps=1"];
    let more = ["sampler.steps=2", "eval.prompts=2", "eval.steps=2", "optim.lr=1e-3"];
    let mut arguments: Vec<&str> = set.iter().chain(&more).flat_map(|set| ["--set", set]).collect();
    arguments.extend(["--out", out]);
    done(&arguments);
}

#[test]
fn a_checkpoint_samples_and_is_scored() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let out = path("run");
    small_run(&out);

    let sample = |from: &[&str], more: &[&str], name: &str| -> Vec<u8> {
        let file = path(name);
        let stdout = done(&[&["sample"], from, &["--prompt", PROMPT, "-n", "2", "--out", &file], more].concat());
        assert_eq!(stdout.trim_end(), file);
        fs::read(file).unwrap()
    };
    let config = Path::new(&out).join("config.toml").to_str().unwrap().to_owned();
    let (run_folder, base) = (["--checkpoint", out.as_str()], ["--config", config.as_str()]);
    let policy = sample(&run_folder, &["--which", "policy"], "policy.png");
    assert!(policy.starts_with(b"\x89PNG"));
    let checkpoint = format!("{out}/checkpoints/update_00000002");
    assert_eq!(sample(&["--checkpoint", &checkpoint], &["--which", "policy"], "again.png"), policy);
    let best = format!("{out}/checkpoints/BEST");
    assert_eq!(sample(&["--checkpoint", &best], &["--which", "policy"], "best.png"), policy);
    for of_run in [&out, &best, &checkpoint] {
        assert!(done(&["inspect", of_run]).contains("update       2"), "{of_run}");
    }
    assert_ne!(sample(&base, &[], "base.png"), policy, "the base model's pictures are others");
    assert_ne!(sample(&run_folder, &["--which", "policy", "--seed", "77"], "seed.png"), policy);

    // The score of the EMA is the one that the run's last evaluation wrote.
    let scores: Value = serde_json::from_str(&done(&["eval", "--checkpoint", &out, "--json"])).unwrap();
    let log = fs::read_to_string(Path::new(&out).join("metrics.jsonl")).unwrap();
    let mut lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let last = lines.rfind(|line| !line["eval.images"].is_null()).unwrap();
    for key in ["eval.reward.ocr.mean", "eval.reward.colour.mean", "eval.exact", "eval.images"] {
        assert_eq!(scores[key].as_f64().unwrap(), last[key].as_f64().unwrap(), "{key}");
    }
    let data = path("prompts.txt");
    fs::write(&data, format!("{PROMPT}\n")).unwrap();
    let text = done(&["eval", "--checkpoint", &out, "--data", &data]);
    assert!(text.lines().any(|line| line.starts_with("eval.images") && line.ends_with(" 1.0000")), "{text}");
    // The same file by what it holds, as it stands, and as lines of JSON.
    let arguments = |format| ["eval", "--checkpoint", &out, "--data", &data, "--format", format];
    refused(&arguments("jsonl"), "line 1: trailing characters; write {\"prompt\": \"...\"}");
    fs::write(&data, serde_json::json!({ "prompt": PROMPT }).to_string()).unwrap();
    refused(&arguments("text"), "prompt \"{");
    assert!(done(&arguments("jsonl")).contains("eval.exact"));
    refused(&["eval", "--checkpoint", &out, "--format", "text"], "--data");

    // Another configuration than the run's is told key by key.
    let lr = path("lr.png");
    let other = run(&["sample", "--checkpoint", &out, "--prompt", PROMPT, "--set", "optim.lr=0.5", "--out", &lr]);
    let told = String::from_utf8(other.stderr).unwrap();
    let change = told.lines().find(|line| line.contains("the configuration has changed since")).unwrap();
    assert!(change.contains(": optim.lr ") && change.ends_with(" -> 0.5"), "{change}");

    // A machine file says what it could not measure, and plan reads it.
    let machine = path("new/machine.toml");
    assert!(done(&["bench", "machine", "--run", &out, "--out", &machine]).starts_with(&machine));
    let text = fs::read_to_string(&machine).unwrap();
    assert!(text.contains("[network]\n# All three are guesses: one rank sends nothing."), "{text}");
    done(&["plan", "--machine", &machine]);
}

/// Copies a fixture's run into the folder `run`; returns its checkpoint of update 2.
fn copy_of_run(fixture: &str, run: &Path) -> PathBuf {
    let (fixture, name) = (Path::new("tests/fixtures").join(fixture), "checkpoints/update_00000002");
    fs::create_dir_all(run.join(name)).unwrap();
    fs::copy(fixture.join("config.toml"), run.join("config.toml")).unwrap();
    for file in fs::read_dir(fixture.join(name)).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), run.join(name).join(file.file_name())).unwrap();
    }
    run.join(name)
}

/// Written by the program before it had a type for the state of a run: it goes on as that program did, which is recorded
/// here. A state that it does not know is refused by name.
#[test]
fn a_run_of_format_3_is_continued() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let checkpoint = copy_of_run("checkpoint_format_3", &out);
    let [run, config] = [out.clone(), out.join("config.toml")].map(|path| path.to_str().unwrap().to_owned());
    let go_on = ["--config", &config, "--out", &run, "--resume", "auto", "--set", "run.updates=3"];

    let manifest = checkpoint.join("manifest.json");
    let whole = fs::read_to_string(&manifest).unwrap();
    let seal = |manifest_text: &str| {
        fs::write(&manifest, manifest_text).unwrap();
        fs::write(checkpoint.join("COMPLETE"), digest::of(manifest_text.as_bytes()) + "\n").unwrap();
    };
    for (from, to, refusal) in [
        ("\"skipped\": 0", "\"skipped\": 0, \"momentum\": 1", "unknown field `momentum`"),
        ("\"unevaluated\": false,", "", "missing field `unevaluated`"),
        ("\"prompts_of\": 0,", "", "stages[0]: missing field `prompts_of`"),
    ] {
        assert!(whole.contains(from), "{from}");
        seal(&whole.replace(from, to));
        refused(&go_on, refusal);
    }
    seal(&whole);

    assert!(done(&["inspect", &run]).contains("format 3, streams 2"));
    assert!(done(&go_on).contains("after 3 updates"));
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let update: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    let recorded = [
        ("update", 3.0),
        ("iteration", 2.0),
        ("stage", 1.0),
        ("skipped", 0.0),
        ("reward.jpeg-compressibility.mean", -1.60375),
        ("loss", 0.029860379829187877),
        ("loss.kl", 1.216378279877972e-6),
        ("grad_norm", 0.20990501428508757),
    ];
    for (name, value) in recorded {
        let now = update[name].as_f64().unwrap();
        assert!((now - value).abs() <= 2e-3 * value.abs(), "{name}: {now}, not {value}");
    }
}

/// A run of the program whose random streams were others: of its checkpoint all is left but going on.
#[test]
fn a_run_with_other_random_numbers_is_used_but_not_continued() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (folder_of_run, checkpoint) = (path("run"), path("run/checkpoints/update_00000002"));
    copy_of_run("checkpoint_format_2", Path::new(&folder_of_run));

    let config = path("run/config.toml");
    for resume in ["auto", &checkpoint] {
        let out = if resume == "auto" { folder_of_run.clone() } else { path("new") };
        let set = ["--set", "run.updates=3"];
        let arguments = [&["--config", &config, "--out", &out, "--resume", resume], &set[..]].concat();
        refused(&arguments, "whose random numbers are others (streams 1, here 2)");
    }
    assert!(!Path::new(&path("new")).exists());

    done(&["sample", "--checkpoint", &folder_of_run, "--prompt", PROMPT, "--out", &path("grid.png")]);
    assert!(done(&["eval", "--checkpoint", &folder_of_run]).contains("eval.images"));
    assert!(done(&["inspect", &folder_of_run]).contains("format 2, streams 1"));
    let output = run(&["export", "--checkpoint", &folder_of_run, "--format", "peft", "--out", &path("lora")]);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let exported = fs::read(path("lora/adapter_model.safetensors")).unwrap();
    let shard = fs::read(Path::new(&checkpoint).join("shard-00000-of-00001.safetensors")).unwrap();
    let ema = safetensors::SafeTensors::deserialize(&shard).unwrap().tensor("ema").unwrap().data().to_vec();
    let exported = safetensors::SafeTensors::deserialize(&exported).unwrap();
    let mut names = exported.names();
    names.sort_unstable(); // the order of the layout: block by block, A before B
    let joined: Vec<u8> = names.iter().flat_map(|name| exported.tensor(name).unwrap().data().to_vec()).collect();
    assert!(joined == ema, "other numbers than the checkpoint's");
}

/// What each command needs of the files that a run was trained with: one after the other is taken away. And all of it from
/// other working folders than the one that the run was started in.
#[test]
fn commands_ask_for_what_they_need_and_for_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let name = |file: &str| path(file).to_str().unwrap().to_owned();
    fs::create_dir_all(path("job/prompts")).unwrap();
    fs::create_dir(path("elsewhere")).unwrap();
    fs::copy("assets/glyphs/base.safetensors", path("job/base.safetensors")).unwrap();
    for file in ["job/prompts/train.txt", "job/prompts/eval.txt", "other.txt"] {
        fs::write(path(file), format!("{PROMPT}\n")).unwrap();
    }
    let config = "[run]\nupdates = 1\neval_every = 0\n[model]\npath = \"base.safetensors\"\ntrainable = \"lora\"\n\
                  [model.lora]\nrank = 2\nalpha = 2\n[data]\ntrain = \"prompts/train.txt\"\neval = \"prompts/eval.txt\"\n\
                  [batch]\nprompts = 1\nimages_per_prompt = 2\ntimesteps = 1\n[sampler]\nsteps = 2\n[eval]\nsteps = 2\n\
                  [[reward]]\nname = \"ocr\"\n";
    fs::write(path("job/mine.toml"), config).unwrap();
    let elsewhere = |arguments: &[&str]| run_in(&path("elsewhere"), arguments);
    // Started beside its configuration's folder, and what it writes comes into the working folder.
    let trained = run_in(folder.path(), &["--config", "job/mine.toml", "--out", "run"]);
    assert_eq!(trained.status.code(), Some(0), "{}", String::from_utf8_lossy(&trained.stderr));

    let count = std::cell::Cell::new(0);
    let fresh = |end: &str| {
        count.set(count.get() + 1);
        name(&format!("out{}{end}", count.get()))
    };
    // Each command by a name, and whether it works now; one that does not names what it lacks.
    let works = |run: &str, more: &[&str], lacking: &[(&str, &str)]| {
        let (png, out) = (fresh(".png"), fresh(""));
        let from = ["--checkpoint", run];
        let of = |format: &'static str| ["export", "--format", format, "--out", &out, "--force"];
        let commands: [(&str, &[&str]); 6] = [
            ("sample", &["sample", "--prompt", PROMPT, "-n", "1", "--out", &png]),
            ("eval", &["eval"]),
            ("eval --data", &["eval", "--data", "../other.txt"]),
            ("diffusers", &of("diffusers")),
            ("peft", &of("peft")),
            ("merged", &of("merged")),
        ];
        for (command, arguments) in commands {
            let output = elsewhere(&[arguments, &from, more].concat());
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            match lacking.iter().find(|(name, _)| *name == command) {
                None => assert_eq!(output.status.code(), Some(0), "{command} {more:?}: {error}"),
                Some((_, words)) => {
                    assert_eq!((output.status.code(), error.lines().count()), (Some(2), 1), "{command}: {error}");
                    assert!(error.contains(words), "{command}: no {words:?} in {error}");
                }
            }
        }
    };
    let run = name("run");
    works(&run, &[], &[]);
    fs::remove_file(path("job/prompts/train.txt")).unwrap();
    works(&run, &[], &[]);
    fs::remove_file(path("job/prompts/eval.txt")).unwrap();
    let no_eval = format!("data.eval = {:?}: there is no such file", name("job/prompts/eval.txt"));
    works(&run, &[], &[("eval", &no_eval)]);
    works(&run, &["--set", "data.eval=../other.txt"], &[]);
    fs::rename(path("job/base.safetensors"), path("moved.safetensors")).unwrap();
    let no_model = format!("model.path = {:?}: there is nothing at this path", name("job/base.safetensors"));
    let lacking = ["sample", "eval --data", "merged"].map(|command| (command, no_model.as_str()));
    works(&run, &[], &[&lacking[..], &[("eval", &no_eval)]].concat());
    fs::rename(path("run"), path("moved run")).unwrap();
    works(&name("moved run"), &["--set", "model.path=../moved.safetensors"], &[("eval", &no_eval)]);

    // The configuration of a run says where the run is.
    for file in ["train.txt", "eval.txt"] {
        fs::copy(path("other.txt"), path("job/prompts").join(file)).unwrap();
    }
    fs::rename(path("moved.safetensors"), path("job/base.safetensors")).unwrap();
    let moved = elsewhere(&["--config", "../moved run/config.toml"]);
    let error = String::from_utf8_lossy(&moved.stderr).into_owned();
    let words =
        format!("run.out = {run}, and the run lies in ../moved run: it was moved or copied; go on here with --out");
    assert!(moved.status.code() == Some(2) && error.contains(&words), "{error}");
    let resumed =
        elsewhere(&["--config", "../moved run/config.toml", "--out", "../moved run", "--set", "run.updates=2"]);
    let error = String::from_utf8_lossy(&resumed.stderr).into_owned();
    assert!(resumed.status.code() == Some(0) && error.contains("continues after update 1"), "{error}");
    assert!(!error.contains("has changed") && !error.contains("held other prompts"), "{error}");
}

#[test]
fn mistakes_in_sampling_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().to_str().unwrap();
    let (config, png) = ("configs/glyphs/flow-awr.toml", &*format!("{empty}/grid.png"));
    refused(&["sample", "--prompt", PROMPT, "--out", png], "--checkpoint");
    refused(&["sample", "--config", config, "--out", png], "--prompt");
    refused(&["sample", "--config", config, "--prompt", "a cat", "--out", png], "not of the form");
    refused(&["sample", "--config", config, "--prompt", PROMPT, "-n", "0", "--out", png], "0");
    refused(&["sample", "--config", config, "--prompt", PROMPT, "--out", empty], "is a folder; name a file");
    let jpg = format!("{empty}/grid.jpg");
    let renamed = format!("pictures are written as PNG, not as jpg; name it {png}");
    refused(&["sample", "--config", config, "--prompt", PROMPT, "--out", &jpg], &renamed);
    refused(&["sample", "--checkpoint", empty, "--prompt", PROMPT, "--out", png], "is neither a checkpoint");
    refused(&["eval", "--checkpoint", empty], "is neither a checkpoint");
    refused(&["eval", "--config", config, "--data", "none.txt"], "none.txt");
    assert!(!Path::new(png).exists());
}

#[test]
fn mistakes_in_file_names_are_refused_by_the_options_name() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = "Cargo.toml/a.jsonl"; // a file is no folder
    refused(&["prompts", "geneval", "--out", nowhere], "--out Cargo.toml/a.jsonl: cannot be written (");
    refused(&["prompts", "geneval", "--out", folder.path().to_str().unwrap()], "is a folder; name a file");
    let none = folder.path().join("none.jsonl");
    refused(&["prompts", "geneval", "-n", "0", "--out", none.to_str().unwrap()], "0");
    assert!(!none.exists());
    refused(&["bench", "machine", "--run", "nothere"], "--run nothere: is no run folder");
    refused(&["plan", "--machine", "nothere"], "--machine nothere: there is no such file");
}

/// Weights that are finite and overflow: no picture, where the rewards would refuse it as well.
#[test]
fn a_picture_that_is_no_number_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    done(&["random-model", "--out", &path("model")]);
    let file = folder.path().join("model/transformer/diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
    let weight = tensors.get_mut("proj_out.weight").unwrap();
    *weight = (&*weight * 1e38).unwrap();
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let [model, cache, out] =
        [format!("model.path={}", path("model")), format!("model.prompt_cache={}", path("cache")), path("a.png")];
    let arguments = ["sample", "--config", "configs/sd35/tiny.toml", "--set", &model, "--set", &cache];
    let output = run(&[&arguments[..], &["--prompt", "a cat", "-n", "1", "--out", &out]].concat());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && error.contains("of the prompt \"a cat\" is not finite"), "{error}");
    assert!(!Path::new(&out).exists());
}
