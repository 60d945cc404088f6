//! `flowrl-dist export` and `inspect` on checkpoints of known content.

use candle_core::{DType, Device, Tensor};
use flowrl_dist::checkpoint::{self, Identity, Shard, TrainState};
use flowrl_dist::config::RunConfig;
use flowrl_dist::export::Base;
use flowrl_dist::model::files::{Adapter, Format, Transformer, Weights};
use flowrl_dist::model::random;
use flowrl_dist::params::{Layout, Trainable};
use flowrl_dist::pipeline::{ModelConfig, Pipeline};
use flowrl_dist::rng::{Purpose, Stream};
use std::fs;
use std::path::{Path, PathBuf};

/// Exit code, stdout, stderr.
fn program(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = assert_cmd::Command::cargo_bin("flowrl-dist").unwrap();
    let output = command.args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn done(arguments: &[&str]) -> String {
    let (code, stdout, stderr) = program(arguments);
    assert_eq!(code, Some(0), "{arguments:?}: {stderr}");
    stdout
}

fn refused(arguments: &[&str], parts: &[&str]) {
    let (code, stdout, stderr) = program(arguments);
    assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{part:?} is not in {stderr}");
    }
}

/// The run folder of the embedded task, as [`run_folder`].
fn glyphs(folder: &Path, trainable: &str) -> (PathBuf, ModelConfig, Layout) {
    let set = [&format!("model.trainable={trainable}"), "model.lora.rank=4", "model.lora.alpha=6"];
    run_folder(&folder.join(trainable), &RunConfig::load(None, &set.map(str::to_owned)).unwrap())
}

/// A run folder with a checkpoint after two updates, whose vectors are random; with the parameters' layout.
fn run_folder(out: &Path, config: &RunConfig) -> (PathBuf, ModelConfig, Layout) {
    let base = Base::of(&config.model).unwrap();
    let layout = Layout::new(&base.model.specs(), config.model.trainable);
    let identity = Identity::new(config.digest().unwrap(), base.digest, &layout, config.run.seed);
    let vectors = ["policy", "ema", "old"].map(|name| (name.to_owned(), vector(name, layout.total)));
    let shard = Shard { ranges: std::iter::once(0..layout.total).collect(), vectors: vectors.into() };
    let state = TrainState { update: 2, iteration: 2, extra: serde_json::Value::Null };
    let root = checkpoint::root(out);
    fs::create_dir_all(out).unwrap();
    let writing = checkpoint::begin(&root, 2, 0).unwrap();
    let entry = checkpoint::write_shard(&writing, 0, 1, &shard).unwrap();
    checkpoint::commit(&root, &state, &identity, vec![entry], 0).unwrap();
    config.write(out).unwrap();
    (out.to_path_buf(), config.model.clone(), layout)
}

/// What the checkpoint holds under `name`.
fn vector(name: &str, total: usize) -> Vec<f32> {
    Stream::new(5, Purpose::Parameters, [name.len() as u64, 0, 0, 0]).normals(total)
}

fn flat(name: &str, layout: &Layout) -> Tensor {
    Tensor::from_vec(vector(name, layout.total), layout.total, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A tensor of a flat vector.
fn entry(layout: &Layout, flat: &Tensor, name: &str) -> Tensor {
    let e = layout.entries.iter().find(|e| e.name == name).unwrap_or_else(|| panic!("no {name}"));
    flat.narrow(0, e.offset, e.len).unwrap().reshape(e.shape.as_slice()).unwrap()
}

#[test]
fn adapters_of_a_run_are_exported() {
    let folder = tempfile::tempdir().unwrap();
    let (run, config, layout) = glyphs(folder.path(), "lora");
    let checkpoint = run.to_str().unwrap();
    let out = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let export = |format: &str, out: &str, more: &[&str]| {
        let arguments = ["export", "--checkpoint", checkpoint, "--format", format, "--out", out];
        done(&[&arguments[..], more].concat())
    };

    let (ema, policy) = (flat("ema", &layout), flat("policy", &layout));
    let (peft, diffusers, which) = (out("peft"), out("diffusers"), out("which"));
    assert_eq!(export("peft", &peft, &[]), format!("{peft}/adapter_config.json\n{peft}/adapter_model.safetensors\n"));
    export("diffusers", &diffusers, &[]);
    export("peft", &which, &["--which", "policy"]);
    for (path, scale, expected) in [(&peft, 1.5, &ema), (&diffusers, 1.0, &ema), (&which, 1.5, &policy)] {
        let adapter = Adapter::open(Path::new(path)).unwrap();
        assert_eq!((adapter.rank, adapter.scale()), (4, Some(scale)), "{path}");
        let read = adapter.flat(&layout, &config.adapters().unwrap(), &Device::Cpu).unwrap();
        let differ = values(&read).iter().zip(values(expected)).any(|(a, b)| (a - b).abs() > 1e-6 * b.abs());
        assert!(!differ, "{path}");
    }
    let shown = done(&["inspect", &peft]);
    assert!(shown.contains("PEFT adapter") && shown.contains("rank 4, scale 1.5, 36 modules: attn.to_k"), "{shown}");

    // Merged: the base model and the update, in the base model's type, which the program starts from.
    let merged = out("merged");
    let file = export("merged", &merged, &["--dtype", "f32"]).trim().to_owned();
    let weights = Weights::open(Path::new(&file)).unwrap();
    let name = "transformer_blocks.3.ff.net.0.proj";
    let pipeline = Pipeline::load(&config, 1, &Device::Cpu).unwrap();
    assert_eq!(pipeline.base_digest, Base::of(&config).unwrap().digest);
    let whole = Layout::new(&pipeline.model.specs(), Trainable::Full);
    let base = entry(&whole, &pipeline.params().unwrap().flatten(&whole).unwrap(), &format!("{name}.weight"));
    let factor = |factor: &str| entry(&layout, &ema, &format!("{name}.{factor}.weight"));
    let update = (factor("lora_B").matmul(&factor("lora_A")).unwrap() * 1.5).unwrap();
    let expected = (base + update).unwrap();
    let ours = weights.tensor(&format!("{name}.weight"), DType::F32, &Device::Cpu).unwrap();
    assert!(values(&ours).iter().zip(values(&expected)).all(|(a, b)| (a - b).abs() < 1e-5));
    let half = export("merged", &merged, &["--force"]).trim().to_owned();
    let stored = Weights::open(Path::new(&half)).unwrap();
    assert!(stored.names().all(|name| stored.dtype(name) == Some(DType::F16)));
    let config = ModelConfig { path: Some(half.clone().into()), ..ModelConfig::default() };
    let started = Pipeline::load(&config, 1, &Device::Cpu).unwrap();
    assert!(done(&["inspect", &half]).contains(&started.base_digest));

    refuses(&run, &peft);
}

/// What `export` refuses of the run of adapters `run`, of which `there` is an export.
fn refuses(run: &Path, there: &str) {
    let (checkpoint, fresh) = (run.to_str().unwrap(), format!("{there}-fresh"));
    let arguments = |checkpoint, out| ["export", "--checkpoint", checkpoint, "--format", "peft", "--out", out];
    refused(&arguments(checkpoint, there), &[there, "holds an export already", "--force"]);
    refused(&arguments("no/such/run", &fresh), &["no/such/run", "there is nothing at this path"]);
    refused(&[&arguments(checkpoint, &fresh)[..], &["--which", "best"]].concat(), &["best", "policy, ema, old"]);
    // Other adapters, another base model, and a checkpoint without its run.
    for (setting, words) in [
        ("model.lora.rank=8", "model.lora: rank = 8, but the checkpoint's transformer_blocks.0."),
        ("model.lora.targets=[\"attn.to_q\"]", "which targets = [\"attn.to_q\"] leave out; give the configuration"),
        ("model.trainable=full", "this run trained the whole model"),
    ] {
        refused(&[&arguments(checkpoint, &fresh)[..], &["--set", setting]].concat(), &[words]);
    }
    refused(&[&arguments(checkpoint, &fresh)[..], &["--transformer-only"]].concat(), &["belongs to --format merged"]);
    let other = run.with_file_name("other.toml");
    let text = fs::read_to_string(run.join("config.toml")).unwrap();
    let base = Path::new(there).with_file_name("merged/base.safetensors");
    fs::write(&other, text.replace("[model]\n", &format!("[model]\npath = {:?}\n", base.to_str().unwrap()))).unwrap();
    let config = ["--config", other.to_str().unwrap()];
    let merged = ["export", "--checkpoint", checkpoint, "--format", "merged", "--out", &fresh];
    refused(&[&merged[..], &config].concat(), &["is of another base model than this run's (model.path "]);
    let alone = run.with_file_name("alone").join("update_00000002");
    fs::create_dir_all(alone.parent().unwrap()).unwrap();
    fs::rename(run.join("checkpoints/update_00000002"), &alone).unwrap();
    refused(&arguments(alone.to_str().unwrap(), &fresh), &["there is no config.toml", "--config"]);
    assert!(!Path::new(&fresh).exists());
}

#[test]
fn a_whole_fine_tune_is_exported_merged_only() {
    let folder = tempfile::tempdir().unwrap();
    let (run, _, layout) = glyphs(folder.path(), "full");
    let (checkpoint, out) = (run.to_str().unwrap(), folder.path().join("model"));
    let arguments = |format| ["export", "--checkpoint", checkpoint, "--format", format, "--out", out.to_str().unwrap()];
    for format in ["diffusers", "peft"] {
        refused(&arguments(format), &["this run trained the whole model, there is no adapter; take --format merged"]);
    }
    let more = ["--which", "policy", "--dtype", "f32"];
    let file = done(&[&arguments("merged")[..], &more].concat()).trim().to_owned();
    let policy = flat("policy", &layout);
    let weights = Weights::open(Path::new(&file)).unwrap();
    assert_eq!(weights.names().count(), layout.entries.len());
    for e in &layout.entries {
        let ours = weights.tensor(&e.name, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(values(&ours), values(&entry(&layout, &policy, &e.name)), "{}", e.name);
    }
}

/// A checkpoint of Stable Diffusion's architecture, by way of the configuration.
#[test]
fn a_run_of_a_transformer_is_exported() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    random::write(random::Size::Tiny, 1, &model, &|_| {}).unwrap();
    let set = [format!("model.path={}", model.display()), "model.lora.rank=4".into(), "model.lora.alpha=6".into()];
    let config = RunConfig::load(Some(Path::new("configs/sd35/tiny.toml")), &set).unwrap();
    let (run, config, layout) = run_folder(&folder.path().join("run"), &config);
    let out = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for format in ["diffusers", "peft", "merged"] {
        let to = out(format);
        done(&["export", "--checkpoint", run.to_str().unwrap(), "--format", format, "--out", &to, "--which", "old"]);
    }
    let old = flat("old", &layout);
    for (format, scale) in [("diffusers", 1.0), ("peft", 1.5)] {
        let adapter = Adapter::open(Path::new(&out(format))).unwrap();
        assert_eq!(adapter.scale(), Some(scale));
        let read = adapter.flat(&layout, &config.adapters().unwrap(), &Device::Cpu).unwrap();
        assert!(values(&read).iter().zip(values(&old)).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs()), "{format}");
    }
    assert_eq!(Format::of(Path::new(&out("merged"))).unwrap(), Format::Pipeline);
    let shown = done(&["inspect", &out("merged")]);
    assert!(shown.contains("text_encoder_3") && !shown.contains("absent"), "{shown}");
    let [merged, base] = [Path::new(&out("merged")), model.as_path()].map(|path| Transformer::open(path).unwrap());
    assert_eq!(merged.config, base.config);
    let name = "transformer_blocks.0.attn.add_k_proj";
    let read = |of: &Transformer| of.weights.tensor(&format!("{name}.weight"), DType::F32, &Device::Cpu).unwrap();
    let factor = |factor: &str| entry(&layout, &old, &format!("{name}.{factor}.weight"));
    let update = (factor("lora_B").matmul(&factor("lora_A")).unwrap() * 1.5).unwrap();
    let expected = (read(&base) + update).unwrap();
    assert!(values(&read(&merged)).iter().zip(values(&expected)).all(|(a, b)| (a - b).abs() < 1e-5));
    let shown = done(&["inspect", model.to_str().unwrap()]);
    assert!(shown.contains("diffusers pipeline") && !shown.contains("absent"), "{shown}");

    // Without a part it is no model that a run can start from, and a script should hear of it.
    fs::remove_dir_all(model.join("vae")).unwrap();
    let (code, shown, _) = program(&["inspect", model.to_str().unwrap()]);
    assert!(code == Some(2) && shown.contains("is absent"), "{code:?}: {shown}");
    // Nor a pipeline to copy the parts of.
    let export = |format: &str, name: &str, more: &[&str]| {
        let (run, out) = (run.to_str().unwrap(), out(name));
        let arguments = ["export", "--checkpoint", run, "--format", format, "--which", "old", "--out", &out];
        program(&[&arguments[..], more].concat())
    };
    let (code, _, words) = export("merged", "parts", &[]);
    assert!(code == Some(2) && words.contains("has no folder vae, which its model_index.json names"), "{words}");
    let (code, files, words) = export("merged", "alone", &["--transformer-only"]);
    assert!(code == Some(0) && files.lines().all(|file| file.contains("/alone/transformer/")), "{files}");
    assert!(words.contains("transformer only: StableDiffusion3Pipeline.from_pretrained(\""), "{words}");

    // An adapter needs no base model.
    fs::rename(&model, folder.path().join("moved")).unwrap();
    let (code, _, words) = export("peft", "without", &[]);
    assert_eq!(code, Some(0), "{words}");
    let [with, without] = ["peft", "without"].map(|name| fs::read(out(name) + "/adapter_model.safetensors").unwrap());
    assert!(with == without);
    let (code, _, words) = export("merged", "nothing", &[]);
    let name = format!("model.path = {model:?}: there is nothing at this path");
    assert!(code == Some(2) && words.contains(&name) && words.contains("--set model.path=PATH"), "{words}");
    assert!(!Path::new(&out("nothing")).exists());
}
