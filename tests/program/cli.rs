//! The program as a person starts it: exit codes, the one line of a mistake, plans, a small run from end to end.

use flowrl_dist::config::RunConfig;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

struct Output {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// The program with these arguments, started by no launcher but what `environment` pretends.
fn run_as(environment: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flowrl-dist"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if ["OMPI_", "PMI", "SLURM_", "RUST_LOG"].iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    let output = command.envs(environment.iter().copied()).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Output { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
}

fn run(arguments: &[&str]) -> Output {
    run_as(&[], arguments)
}

/// Standard output of a call that must succeed.
fn done(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert_eq!(output.code, Some(0), "{arguments:?}: {}", output.stderr);
    output.stdout
}

/// A call that must end with exit code 2 and one line on stderr that contains `parts`.
fn refused(arguments: &[&str], parts: &[&str]) {
    let Output { code, stdout, stderr } = run(arguments);
    assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?}: {stderr}");
    assert!(stderr.starts_with("flowrl-dist: ") && stderr.lines().count() == 1, "{stderr}");
    parts.iter().for_each(|part| assert!(stderr.contains(part), "no {part:?} in {stderr}"));
}

#[test]
fn mistakes_are_one_line_and_exit_code_2() {
    for command in ["train", "plan"] {
        refused(&[command, "--set", "batch.images_per_prompt=1"], &["images_per_prompt = 1", "use 2 or more"]);
        refused(&[command, "--set", "optim.lr=nan"], &["--set: optim.lr = NaN", "above 0"]);
        refused(&[command, "--set", "optm.lr=1"], &["did you mean optim?"]);
        refused(&[command, "--config", "none.toml"], &["none.toml: cannot be read", "--config"]);
        refused(&[command, "--config", "src"], &["src: cannot be read"]);
    }
    refused(&["--set", "reward.0.weight=inf"], &["reward[0].weight = inf", "finite"]);
    refused(&["--out", "Cargo.toml"], &["--out Cargo.toml: Cargo.toml is a file; name a folder"]);
    refused(&["--out", "Cargo.toml/a/b"], &["--out Cargo.toml/a/b: Cargo.toml is a file; name a folder"]);
    refused(&["--out", "/proc/none"], &["run folder /proc/none: cannot be made or written (", "with --out or run.out"]);
    refused(&["--resume", ""], &["--resume needs auto, never or the folder of a checkpoint"]);
    let pretrain = ["pretrain", "--config", "configs/glyphs/pretrain.toml", "--set"];
    refused(&[&pretrain[..], &["batchs=3"]].concat(), &["--set: batchs: no such key; did you mean batch?"]);
    refused(&[&pretrain[..], &["steps=0"]].concat(), &["--set: steps = 0: must be at least 1"]);
    refused(&[&pretrain[..], &["optim.lr=0"]].concat(), &["--set: optim.lr = 0: must be"]);
    refused(&[&pretrain[..], &["sampler.step=1"]].concat(), &["sampler.step: no such key", "sampler.steps?"]);
}

/// What would end in an abort, a hang or the reader's terminal.
#[test]
fn hostile_surroundings_are_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let pipe = path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    refused(&["plan", "--config", &pipe], &["is a pipe, a socket or a device, not a file"]);
    refused(&["inspect", &pipe], &["pipe"]);

    let root = folder.path().join("run/checkpoints");
    fs::create_dir_all(&root).unwrap();
    for named in ["BEST", "../BEST", "/etc/passwd", ""] {
        fs::write(root.join("BEST"), named).unwrap();
        refused(&["inspect", root.join("BEST").to_str().unwrap()], &["BEST: names", "which is no checkpoint"]);
    }

    let output = run(&["plan", "--config", "no\u{1b}[2J\u{1b}[31m\nflowrl-dist: all is well"]);
    assert_eq!((output.code, output.stderr.lines().count()), (Some(2), 1), "{}", output.stderr);
    assert!(!output.stderr.trim_end().contains(char::is_control), "{:?}", output.stderr);
    let output = run(&["plan", &format!("--{}", "x".repeat(100)), "\u{1b}[31m"]);
    assert!(output.code == Some(2) && !output.stderr.contains('\u{1b}'), "{:?}", output.stderr);
    let output = run(&["plan", "--set", &format!("run.{}=1", "x".repeat(50_000))]);
    assert_eq!(output.code, Some(2));
    assert!(output.stderr.len() < 1200, "{} bytes", output.stderr.len());

    for threads in ["0", "-1", "many", "1000000"] {
        let arguments =
            ["sample", "--config", "configs/glyphs/flow-awr.toml", "--prompt", "a", "--out", &path("a.png")];
        let output = run_as(&[("RAYON_NUM_THREADS", threads)], &arguments);
        let said = (output.code, output.stderr.lines().count());
        assert_eq!(said, (Some(2), 1), "{threads}: {}", output.stderr);
        assert!(output.stderr.contains("RAYON_NUM_THREADS"), "{}", output.stderr);
    }
}

#[test]
fn unknown_arguments_are_exit_code_2() {
    for arguments in [&["trian"][..], &["--colour", "3"], &["plan", "--ranks", "two"], &["inspect"], &["--out", ""]] {
        let output = run(arguments);
        assert_eq!((output.code, output.stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(output.stderr.starts_with("error: "), "{}", output.stderr);
    }
}

/// What other programs call it.
#[test]
fn arguments_of_other_programs_are_told_what_to_write_here() {
    refused(&["-n", "2"], &["-n: no such argument; ranks are started by a launcher: mpirun -n 2"]);
    refused(&["train", "--nproc_per_node=8"], &["--nproc_per_node", "mpirun -n 2"]);
    refused(&["--hostfile", "hosts"], &["launch/mpirun.sh --hostfile"]);
    refused(&["--dry-run"], &["flowrl-dist plan prints what a run would do"]);
    refused(&["train", "--updates", "3"], &["--set KEY=VALUE"]);
    refused(&["--run.seed=7"], &["--set KEY=VALUE"]);
    refused(&["run.seed=7"], &["--set KEY=VALUE"]);
    refused(&["--output_dir", "runs/a"], &["--out DIR"]);
}

/// Without mpirun MPI could only fail, or wait: the line must come before MPI is looked at.
#[test]
fn a_mistake_is_told_before_mpi_starts() {
    let pretended = [("OMPI_COMM_WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_RANK", "0"), ("PMIX_RANK", "0")];
    let since = Instant::now();
    let output = run_as(&pretended, &["--set", "data.train=none.txt"]);
    assert_eq!(output.code, Some(2), "{}", output.stderr);
    assert_eq!(output.stderr.lines().count(), 1, "{}", output.stderr);
    assert!(output.stderr.contains("data.train = \"none.txt\": there is no such file"), "{}", output.stderr);
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
}

#[test]
fn help_shows_an_example_and_version_the_version() {
    for command in ["", "train", "plan", "pretrain", "report", "export", "inspect"] {
        let arguments: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let help = done(&arguments);
        assert!(help.contains("Example") && help.contains(&format!("flowrl-dist {command}")), "{help}");
    }
    assert_eq!(done(&["--version"]), format!("flowrl-dist {}\n", env!("CARGO_PKG_VERSION")));
}

/// A device is chosen before the server answers; one that cannot be had is told in the option's own words.
#[test]
fn a_reward_server_says_which_device_it_may_have() {
    let help = done(&["serve-reward", "--help"]);
    assert!(help.contains("--device <auto|cpu|cuda>") && help.contains("[default: auto]"), "{help}");
    let serve = ["serve-reward", "--reward", "colour", "--listen", "127.0.0.1:0", "--device"];
    let with = |device| [&serve[..], &[device]].concat();
    let output = run(&with("tpu"));
    assert!(output.code == Some(2) && output.stderr.contains("'tpu' for '--device"), "{}", output.stderr);
    if !cfg!(feature = "cuda") {
        refused(&with("cuda"), &["--device cuda, but this program was built without CUDA", "or give --device cpu"]);
    }
}

#[test]
fn every_configuration_of_the_project_has_a_plan() {
    let files =
        ["configs/glyphs", "configs/glyphs/compare", "configs/shapes"].map(|folder| fs::read_dir(folder).unwrap());
    let files = files.into_iter().flatten().map(|entry| entry.unwrap().path());
    let name = |file: &Path| file.file_name().unwrap().to_string_lossy().into_owned();
    let runs = files.filter(|file| name(file).ends_with(".toml") && !name(file).starts_with("pretrain"));
    let runs: Vec<PathBuf> = runs.collect();
    assert_eq!(runs.len(), 6 + 1 + 5);
    for run in runs {
        let plan = done(&["plan", "--config", run.to_str().unwrap()]);
        assert!(plan.contains("training points"), "{run:?}: {plan}");
    }
    done(&["plan", "--config", "configs/reference.toml", "--ranks", "8"]);
}

/// Six tasks by four methods, the small one, and the claims; of Large two tasks by two methods: memory and time on 8, 16
/// and 64 GPUs, without the model's files.
#[test]
fn every_preset_of_stable_diffusion_has_a_forecast() {
    let folders =
        ["configs/sd35", "configs/sd35/claims", "configs/sd35-large"].map(|folder| fs::read_dir(folder).unwrap());
    let files = folders.into_iter().flatten().map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> = files.filter(|file| file.extension().is_some_and(|end| end == "toml")).collect();
    assert_eq!(files.len(), 6 * 4 + 1 + 1 + 8 + 2 * 2);
    for file in &files {
        let machine = "configs/machines/h100x8.toml";
        let plan = |ranks: &str| -> Value {
            let arguments =
                ["plan", "--config", file.to_str().unwrap(), "--ranks", ranks, "--machine", machine, "--json"];
            serde_json::from_str(&done(&arguments)).unwrap()
        };
        let memory = &plan("8")["forecast"]["memory"];
        assert!(memory["held_gib"].as_f64().unwrap() < memory["device_gib"].as_f64().unwrap(), "{file:?}: {memory}");
        let seconds = ["8", "16", "64"].map(|ranks| plan(ranks)["forecast"]["iteration"].as_f64().unwrap());
        assert!(seconds[0] > seconds[1] && seconds[1] > seconds[2] && seconds[2] > 0.0, "{file:?}: {seconds:?}");
    }
}

#[test]
fn plans_count_what_each_rank_does() {
    let plan = |ranks: &str| -> Value { serde_json::from_str(&done(&["plan", "--ranks", ranks, "--json"])).unwrap() };
    let one = plan("1");
    for ranks in [1_u64, 2, 8] {
        let plan = plan(&ranks.to_string());
        assert_eq!(plan["ranks"], ranks);
        assert_eq!((&plan["images"], &plan["solver_steps"], &plan["timesteps"]), (&128.into(), &10.into(), &4.into()));
        assert_eq!(plan["images_per_rank"], serde_json::json!([128 / ranks, 128 / ranks]));
        assert_eq!((&plan["points"], &plan["iterations"]), (&serde_json::json!([512]), &40.into()));
        assert_eq!(plan["trainable"], one["trainable"]);
        assert_eq!(plan["shard"], one["trainable"].as_u64().unwrap().div_ceil(ranks));
        for sent in plan["update_sent"][0].as_array().unwrap() {
            assert_eq!(sent["bytes"].as_u64().unwrap() == 0, ranks == 1, "{sent}");
            assert_eq!(sent["calls"].as_u64().unwrap() == 0, ranks == 1, "{sent}");
        }
        assert!(plan["work"]["train"].as_f64().unwrap() > plan["work"]["sample"].as_f64().unwrap() / 10.0);
        for key in ["iterations_per_epoch", "micro_batch"] {
            assert!(plan[key].as_u64().is_some_and(|n| n > 0), "{key}: {}", plan[key]);
        }
        let memory = plan["memory"].as_array().unwrap();
        assert!(!memory.is_empty() && memory.iter().all(|item| item["bytes"].as_u64().unwrap() > 0), "{memory:?}");
    }
    let text = done(&["plan", "--ranks", "2", "--ranks-per-node", "1"]);
    for line in [
        "images a rank  64, of 4 groups\n",
        "MiB reduce-scatter of gradients (8 calls)\n",
        "sent by each of 2 nodes  0.0 MiB between",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[test]
fn plans_tell_the_stages() {
    let arguments = ["plan", "--config", "configs/glyphs/stages.toml"];
    let text = done(&arguments);
    for line in [
        "  stage 0 from update 0 on: colour 0, ocr 1; glyphs: 14400 prompts, 1800 iterations an epoch; 30 iterations\n",
        "  stage 1 from update 30 on: colour 0.5, ocr 1; glyphs: 14400 prompts, 1800 iterations an epoch; 30 iterations\n",
    ] {
        assert!(text.contains(line), "{line}{text}");
    }
    let settings = ["batch.updates_per_iteration=4", "run.updates=30"].map(|set| ["--set", set]).concat();
    let json = done(&[&arguments[..], &settings, &["--json"]].concat());
    let plan: Value = serde_json::from_str(&json).unwrap();
    let stages = plan["stages"].as_array().unwrap();
    assert_eq!(stages.iter().map(|stage| stage["iterations"].as_u64().unwrap()).collect::<Vec<_>>(), [8, 0, 0]);
    assert_eq!(stages[2]["weights"], serde_json::json!({ "colour": 0.5, "ocr": 1.0 }));
    assert!(!done(&["plan"]).contains("stage 0"), "nothing to tell");
}

#[test]
fn impossible_plans_name_the_nearest_possible_ones() {
    refused(&["plan", "--ranks", "0"], &["ranks = 0: use at least 1"]);
    refused(&["plan", "--ranks", "129"], &["129 ranks", "= 128 images", "at most 128 ranks or batch.prompts = 9"]);
    refused(&["plan", "--set", "batch.prompts=20000"], &["batch.prompts = 20000", "use at most 14400"]);
}

#[test]
fn what_is_no_checkpoint_and_no_run_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (out, file) = (folder.path().join("out"), folder.path().join("file"));
    fs::write(&file, "x").unwrap();
    let [out, file, empty] = [&out, &file, folder.path()].map(|path: &Path| path.to_str().unwrap());
    let none = format!("{empty}/none");
    let since = Instant::now();
    refused(&["--out", out, "--resume", &none], &[&none, "there is nothing at this path; give a checkpoint"]);
    refused(&["--out", out, "--resume", empty], &[empty, "is neither a checkpoint nor a run folder; give"]);
    refused(&["--out", out, "--resume", file], &[file, "is neither a checkpoint nor a run folder; give"]);
    refused(&["inspect", &none], &[&none]);
    refused(&["inspect", empty], &[empty, "not a checkpoint"]);
    refused(&["inspect", file], &[file]);
    refused(&["report", &none], &[&none, "is no run folder"]);
    refused(&["report", file], &[file, "is no run folder"]);
    refused(&["report", empty], &[empty, "no metrics.jsonl"]);
    assert!(!Path::new(out).exists(), "nothing was started");
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
}

/// The smallest run: two updates of two images each.
const SMALL: [&str; 9] = [
    "run.updates=2",
    "run.eval_every=0",
    "batch.prompts=1",
    "batch.images_per_prompt=2",
    "batch.timesteps=1",
    "sampler.steps=2",
    "eval.prompts=2",
    "eval.steps=2",
    "run.name=small",
];

#[test]
fn a_small_run_keeps_its_contract() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let mut arguments: Vec<&str> = SMALL.iter().flat_map(|set| ["--set", set]).collect();
    arguments.extend(["--out", out.to_str().unwrap()]);

    let stdout = done(&arguments);
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    assert!(stdout.contains(out.join("report.html").to_str().unwrap()), "{stdout}");
    run_folder_is_whole(&out);

    // It is done: the same command only writes the report again.
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let again = run(&arguments);
    assert_eq!((again.code, again.stdout.lines().count()), (Some(0), 1), "{}", again.stderr);
    assert!(again.stderr.contains("continues after update 2"), "{}", again.stderr);
    assert_eq!(fs::read_to_string(out.join("metrics.jsonl")).unwrap(), metrics);
    assert_eq!(done(&["report", out.to_str().unwrap()]).trim_end(), out.join("report.html").to_str().unwrap());

    let checkpoint = out.join("checkpoints/update_00000002");
    let path = checkpoint.to_str().unwrap();
    assert!(done(&["inspect", path]).contains("update       2"));
    let described: Value = serde_json::from_str(&done(&["inspect", path, "--json"])).unwrap();
    assert_eq!((&described["state"]["update"], &described["world_size"]), (&2.into(), &1.into()));

    let with = |more: &[&'static str]| -> Vec<&str> { arguments.iter().copied().chain(more.iter().copied()).collect() };
    refused(&with(&["--resume", "never"]), &["holds a run already, at update 2; pass another --out"]);
    let foreign = run(&with(&["--set", "model.trainable=lora"]));
    assert_eq!(foreign.code, Some(2), "{}", foreign.stderr);
    let last = foreign.stderr.lines().last().unwrap();
    assert!(last.contains(path) && last.contains("trainable elements"), "{}", foreign.stderr);

    let shard = checkpoint.join("shard-00000-of-00001.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, bytes).unwrap();
    refused(&["inspect", path], &[shard.to_str().unwrap(), "it is damaged; delete"]);
    let damaged = run(&arguments);
    assert_eq!((damaged.code, damaged.stdout.as_str()), (Some(2), ""), "{}", damaged.stderr);
    let last = damaged.stderr.lines().last().unwrap();
    assert!(last.contains(shard.to_str().unwrap()) && last.contains("--resume"), "{}", damaged.stderr);
}

fn run_folder_is_whole(out: &Path) {
    let checkpoint = "checkpoints/update_00000002";
    let shard = format!("{checkpoint}/shard-00000-of-00001.safetensors");
    let complete = [format!("{checkpoint}/COMPLETE"), format!("{checkpoint}/manifest.json"), shard];
    let files = ["report.html", "samples/before_after.png"];
    let samples = [0, 2].map(|update| format!("samples/update_{update:08}.png"));
    for file in files.into_iter().map(String::from).chain(samples).chain(complete) {
        assert!(fs::metadata(out.join(&file)).is_ok_and(|m| m.len() > 0), "{file}");
    }
    assert!(out.join("logs/rank_00000.log").is_file());
    let is_events = |name: String| name.starts_with("events.out.tfevents.");
    assert!(fs::read_dir(out).unwrap().any(|e| is_events(e.unwrap().file_name().into_string().unwrap())));

    let written = out.join("config.toml");
    done(&["plan", "--config", written.to_str().unwrap()]);
    let given = RunConfig::load(None, &SMALL.map(String::from)).unwrap();
    let resolved = RunConfig::load(Some(&written), &[]).unwrap();
    assert_eq!(resolved.digest().unwrap(), given.digest().unwrap());
    assert_eq!(resolved.run.out, out);

    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (evaluations, updates): (Vec<_>, Vec<_>) = lines.iter().partition(|line| !line["eval.images"].is_null());
    let numbers = |lines: &[&Value]| lines.iter().map(|line| line["update"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!((numbers(&updates), numbers(&evaluations)), (vec![1, 2], vec![0, 2]));
    for (update, iteration) in updates.iter().zip(0..) {
        assert_eq!(update["iteration"], iteration);
        for key in [
            "reward.ocr.mean",
            "loss",
            "grad_norm",
            "lr",
            "time.sample",
            "time.reward",
            "time.reward_busy",
            "time.train",
            "time.optimizer",
        ] {
            assert!(update[key].is_number(), "{key} in {update}");
        }
    }
    for evaluation in evaluations {
        assert_eq!(evaluation["eval.images"], 2);
        for key in ["eval.reward.ocr.mean", "eval.reward.colour.mean", "eval.exact", "time.eval"] {
            assert!(evaluation[key].is_number(), "{key} in {evaluation}");
        }
    }
}
