//! The whole way of Stable Diffusion 3.5 on a small model of random weights: text encoders, cache, rollout, decoder, reward,
//! update, evaluation, checkpoint, export; the same run on one rank and on two.

use crate::common::{Job, Output, on_ranks};
use flowrl_dist::checkpoint;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(300);

const PROGRAM: &str = env!("CARGO_BIN_EXE_flowrl-dist");

/// A run of seconds: nothing divides the 3 x 3 images.
const SMALL: [&str; 10] = [
    "run.updates=2",
    "run.eval_every=2",
    "run.checkpoint_every=0",
    "batch.prompts=3",
    "batch.images_per_prompt=3",
    "batch.micro_batch=2",
    "batch.timesteps=2",
    "sampler.steps=3",
    "eval.steps=3",
    "eval.prompts=4",
];

struct Folder(tempfile::TempDir);

impl Folder {
    /// A folder with a model.
    fn new() -> Self {
        Self::of_size("tiny")
    }

    fn of_size(size: &str) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.done(&["random-model", "--size", size, "--out", &folder.name("model")]);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// What the program says on one rank; it must succeed.
    fn done(&self, arguments: &[&str]) -> String {
        Job::start(Command::new(PROGRAM).args(arguments)).finish(TIMEOUT).success().stdout
    }

    /// Trains into the folder `out`.
    fn train(&self, ranks: usize, out: &str, settings: &[&str]) -> Output {
        let mut command = match ranks {
            1 => Command::new(PROGRAM),
            _ => on_ranks(ranks, Path::new(PROGRAM)),
        };
        command.args(["--config", "configs/sd35/tiny.toml", "--out", &self.name(out)]);
        let own = [format!("model.path={}", self.name("model")), format!("model.prompt_cache={}", self.name("cache"))];
        for setting in own.iter().map(String::as_str).chain(SMALL).chain(settings.iter().copied()) {
            command.args(["--set", setting]);
        }
        Job::start(&mut command).finish(TIMEOUT)
    }

    /// The lines of the metrics.
    fn metrics(&self, out: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(out).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The trained parameters of the newest checkpoint.
    fn policy(&self, out: &str) -> Vec<f32> {
        let newest = checkpoint::newest(&checkpoint::root(&self.path(out))).unwrap().unwrap();
        let reader = checkpoint::open(&newest.path).unwrap();
        let whole = 0..reader.manifest().identity.total;
        reader.read_vectors(&["policy"], std::slice::from_ref(&whole)).unwrap().vectors.remove("policy").unwrap()
    }

    fn cached(&self) -> usize {
        let encodings = fs::read_dir(self.path("cache")).unwrap().map(|entry| entry.unwrap().path());
        encodings.map(|folder| fs::read_dir(folder).unwrap().count()).sum()
    }
}

/// |a - b| / |b|.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
    (difference / b.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}

/// A model of Large's layout trains and is exported; under another kind it is refused with the kind that it is of.
#[test]
fn a_small_model_of_larges_layout_trains() {
    let folder = Folder::of_size("large-tiny");
    let refused = folder.train(1, "medium", &[]);
    let (code, stderr) = (refused.code(), refused.stderr);
    assert_eq!(code, 2, "{stderr}");
    let line = "model.kind = \"sd35-medium\": the weights in ";
    assert!(stderr.contains(line) && stderr.contains("set model.kind = \"sd35-large\""), "{stderr}");
    let shown = folder.done(&["inspect", &folder.name("model")]);
    assert!(shown.contains("model.kind   sd35-large"), "{shown}");
    folder.train(1, "large", &["model.kind=sd35-large", "run.updates=1", "run.eval_every=0"]).success();
    let losses = folder.metrics("large").iter().filter(|line| line["loss"].is_number()).count();
    assert_eq!(losses, 1);
    let (checkpoint, out) = (folder.name("large"), folder.name("merged"));
    folder.done(&["export", "--checkpoint", &checkpoint, "--format", "merged", "--out", &out]);
    let shown = folder.done(&["inspect", &out]);
    assert!(shown.contains("3 blocks (0 with a second attention)"), "{shown}");
}

#[test]
fn a_small_model_trains_from_prompts_to_an_export() {
    let folder = Folder::new();
    folder.train(2, "two", &[]).success();
    // 2 iterations of 3 prompts, 12 for the picture of before and after, and the empty one; none twice.
    assert_eq!(folder.cached(), 3 + 3 + 12 + 1);
    let metrics = folder.metrics("two");
    let number = |line: &Value, key: &str| line[key].as_f64().unwrap_or_else(|| panic!("{key} in {line}"));
    let updates: Vec<&Value> = metrics.iter().filter(|line| line["loss"].is_number()).collect();
    assert_eq!(updates.len(), 2);
    for update in &updates {
        assert!(number(update, "reward.jpeg-compressibility.mean") < 0.0, "kB, negative");
        assert!(number(update, "grad_norm") > 0.0);
        assert_eq!(number(update, "images"), 9.0);
    }
    assert!(metrics.iter().any(|line| line["eval.reward.jpeg-compressibility.mean"].is_number()));
    let grid = image::open(folder.path("two").join("samples/before_after.png")).unwrap();
    assert!(grid.width() > 128);

    // One rank does the same.
    folder.train(1, "one", &[]).success();
    assert_eq!(folder.cached(), 19);
    let one = folder.metrics("one");
    let first = |metrics: &[Value], key: &str| number(metrics.iter().find(|line| line["update"] == 1).unwrap(), key);
    let reward = "reward.jpeg-compressibility.mean";
    assert_eq!(first(&one, reward), first(&metrics, reward), "samples do not depend on the number of ranks");
    // Gradients are small here and AdamW's first steps their signs, so that the weights would compare rounding.
    for key in ["loss", "grad_norm"] {
        let (one, two) = (first(&one, key), first(&metrics, key));
        assert!((one / two - 1.0).abs() < 1e-4, "{key}: {one} and {two}");
    }

    let (run, export) = (folder.name("two"), folder.name("export"));
    folder.done(&["export", "--checkpoint", &run, "--format", "diffusers", "--which", "policy", "--out", &export]);
    assert!(folder.path("export").join("pytorch_lora_weights.safetensors").is_file());
    // A run that starts from the export has its adapters: with steps of next to nothing it stays there.
    let settings = [format!("model.lora.path={export}"), "run.updates=1".into(), "optim.lr=1e-12".into()];
    folder.train(1, "warm", &settings.each_ref().map(String::as_str)).success();
    // A B that was multiplied by alpha / rank and divided again.
    let (warm, two) = (folder.policy("warm"), folder.policy("two"));
    assert!(distance(&warm, &two) < 1e-6, "{}", distance(&warm, &two));
    let words = folder.done(&["inspect", &folder.name("model")]);
    assert!(words.contains("text_encoder_3") && words.contains("vae"), "{words}");
    let picture = folder.name("picture.png");
    folder.done(&["sample", "--checkpoint", &run, "--prompt", "a red boat", "-n", "2", "--out", &picture]);
    assert_eq!(folder.cached(), 20);

    // The prompts of every stage are encoded before training begins; the first stage is shorter than the whole run was.
    // So is what evaluations are guided away from, and what nothing is guided away from is not.
    let stage = "stage=[{at_update=1, train=\"configs/sd35/prompts/signs.txt\"}]";
    let eval = folder.name("eval");
    fs::write(&eval, r#"{"prompt": "a red boat", "negative_prompt": "blur"}"#).unwrap();
    let eval = format!("data.eval={eval}");
    folder.train(1, "unguided", &["run.updates=1", &eval]).success();
    assert_eq!(folder.cached(), 20);
    folder.train(2, "staged", &[stage, &eval, "eval.guidance=2"]).success();
    assert_eq!(folder.cached(), 20 + 3 + 1);
    let staged = folder.metrics("staged");
    assert_eq!(first(&staged, reward), first(&metrics, reward));
    assert_eq!(staged.iter().filter(|line| line["stage"] == 1).count(), 1);
}

#[test]
fn a_model_that_is_not_whole_is_refused_before_the_run() {
    let folder = Folder::new();
    fs::remove_dir_all(folder.path("model/vae")).unwrap();
    fs::remove_file(folder.path("model/text_encoder_2/model.safetensors")).unwrap();
    let output = folder.train(2, "run", &[]);
    assert_eq!(output.code(), 2, "{output}");
    let line =
        output.stderr.lines().find(|line| line.starts_with("flowrl-dist:")).unwrap_or_else(|| panic!("{output}"));
    assert!(line.contains("vae is absent") && line.contains("text_encoder_2"), "{line}");
    assert!(!folder.path("run").exists(), "nothing was begun");
    let output = folder.train(2, "run", &["model.path=none"]);
    assert_eq!(output.code(), 2, "{output}");
    assert!(output.stderr.contains("model.path = \"none\": there is nothing at this path; download"), "{output}");
}

/// A decoder of another host, or of another life of the run, draws other pictures of the same latents.
#[test]
fn another_decoder_is_refused_on_one_rank_and_on_resuming() {
    let folder = Folder::new();
    for host in ["0", "1"] {
        fs::create_dir(folder.path(host)).unwrap();
        folder.done(&["random-model", "--out", &folder.name(&format!("{host}/m"))]);
    }
    let vae = folder.path("1/m/vae/config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&vae).unwrap()).unwrap();
    config["scaling_factor"] = 1.25.into();
    fs::write(&vae, config.to_string()).unwrap();
    let presets = std::env::current_dir().unwrap().join("configs/sd35/tiny.toml");
    let set = SMALL.map(|set| format!("--set {set}")).join(" ");
    let script = format!(
        "cd {}/$OMPI_COMM_WORLD_RANK; exec {PROGRAM} --config {} --out {} {set} --set model.path=m --set model.prompt_cache={}",
        folder.path("").display(),
        presets.display(),
        folder.name("run"),
        folder.name("cache"),
    );
    let output = Job::start(on_ranks(2, Path::new("sh")).args(["-c", &script])).finish(TIMEOUT);
    let told = "vae in model.path: rank 1 on ";
    assert!(output.code() == 2 && output.stderr.contains(told), "{output}");

    folder.train(1, "run", &["run.updates=1"]).success();
    fs::copy(&vae, folder.path("model/vae/config.json")).unwrap();
    let output = folder.train(1, "run", &[]);
    let told = "was trained with another vae than this run's (digest ";
    assert!(output.code() == 2 && output.stderr.contains(told), "{output}");
    let output = Job::start(Command::new(PROGRAM).args(["eval", "--checkpoint", &folder.name("run")])).finish(TIMEOUT);
    assert!(output.code() == 2 && output.stderr.contains(told), "{output}");
}
