//! Adapters and merged models, read and written.

use super::common::*;
use candle_core::{DType, Device, Tensor};
use flowrl_dist::export::{Base, Form, Options, Place, Trained};
use flowrl_dist::model::files::{Adapter, Transformer};
use flowrl_dist::model::mmdit::LORA_TARGETS;
use flowrl_dist::params::{Layout, LoraConfig, Trainable};
use std::fs;
use std::path::{Path, PathBuf};

pub fn lora() -> LoraConfig {
    LoraConfig { rank: 4, alpha: 8.0, targets: LORA_TARGETS.map(String::from).to_vec() }
}

/// The small transformer.
pub fn base(lora: Option<&LoraConfig>) -> Base {
    Base::transformer(&fixture("sd3_micro"), lora).unwrap()
}

pub fn trained(flat: impl Fn(&Layout) -> Tensor, lora: Option<LoraConfig>) -> Trained {
    let trainable = if lora.is_some() { Trainable::Lora } else { Trainable::Full };
    let layout = Layout::new(&base(lora.as_ref()).model.specs(), trainable);
    let flat = flat(&layout);
    Trained { lora, layout, flat }
}

/// Writes an export into the folder `out`, which is not there yet.
pub fn export(trained: &Trained, form: &Form, out: &Path, options: &Options) -> Vec<PathBuf> {
    trained.write(form, &Place::new(out, false).unwrap(), options).unwrap()
}

/// The recorded adapter in a file of another program, as ours.
fn recorded(path: &str) -> Trained {
    let adapter = Adapter::open(&fixture(path)).unwrap();
    trained(|layout| adapter.flat(layout, &lora(), &Device::Cpu).unwrap(), Some(lora()))
}

/// The velocity of the transformer at `path` with the trained parameters, on the recorded inputs.
pub fn velocity_with(trained: &Trained, path: &Path) -> Tensor {
    let transformer = Transformer::open(path).unwrap();
    let loaded = transformer.load(trained.lora.as_ref(), LATENT, DType::F32, 0, &Device::Cpu).unwrap();
    let params = loaded.params().unwrap().with_flat(&trained.layout, &trained.flat).unwrap();
    velocity(&loaded.model, &params, &tensors(&fixture("sd3_lora/io.safetensors")))
}

/// The velocity of the transformer at `path` as it is.
pub fn velocity_of(path: &Path) -> Tensor {
    let loaded = Transformer::open(path).unwrap().load(None, LATENT, DType::F32, 0, &Device::Cpu).unwrap();
    velocity(&loaded.model, &loaded.params().unwrap(), &tensors(&fixture("sd3_lora/io.safetensors")))
}

#[test]
fn parity_of_adapters_that_others_wrote() {
    let io = tensors(&fixture("sd3_lora/io.safetensors"));
    for (path, output) in [
        ("peft", "out.v"),
        ("peft/old", "out.v_old"),
        ("peft_min", "out.v"),
        ("peft_min/adapter_model.safetensors", "out.v"),
        ("diffusers_folded", "out.v"),
        ("diffusers_meta", "out.v"),
        ("diffusers_meta/pytorch_lora_weights.safetensors", "out.v"),
    ] {
        let trained = recorded(&format!("sd3_lora/{path}"));
        let error = max_error(&velocity_with(&trained, &fixture("sd3_micro")), &io[output]);
        eprintln!("{path}: {error:.1e}");
        assert!(error <= 1e-5, "{path}: {error:.1e}");
    }
    // Without a word about alpha the scale is 1: as far off as diffusers itself was recorded to be.
    let v = velocity_with(&recorded("sd3_lora/diffusers"), &fixture("sd3_micro"));
    let off = (v - &io["out.v"]).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    let meta: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(fixture("sd3_lora/meta.json")).unwrap()).unwrap();
    let recorded = meta["pipeline_load_error"]["diffusers"]["max_abs_vs_peft"].as_f64().unwrap();
    let off = f64::from(off.to_scalar::<f32>().unwrap());
    assert!((off - recorded).abs() < 1e-5, "{off} {recorded}");
}

/// Every tensor of two files, by name.
fn compare(ours: &Path, theirs: &Path) {
    let (ours, theirs) = (tensors(ours), tensors(theirs));
    let names = |t: &Tensors| t.keys().cloned().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(names(&ours), names(&theirs));
    for (name, theirs) in &theirs {
        let (a, b) = (values(&ours[name]), values(theirs));
        assert_eq!(ours[name].dims(), theirs.dims(), "{name}");
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-6), "{name}");
    }
}

#[test]
fn parity_of_our_adapters_with_the_recorded_files() {
    let folder = tempfile::tempdir().unwrap();
    let trained = recorded("sd3_lora/peft");
    let write = |name: &str, form| export(&trained, &form, &folder.path().join(name), &Options::default());
    let files = write("diffusers", Form::Diffusers);
    assert_eq!(files, [folder.path().join("diffusers/pytorch_lora_weights.safetensors")]);
    compare(&files[0], &fixture("sd3_lora/diffusers_folded/pytorch_lora_weights.safetensors"));
    let files = write("peft", Form::Peft);
    compare(&files[1], &fixture("sd3_lora/peft_min/adapter_model.safetensors"));
    let json = |path: &Path| -> serde_json::Value { serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap() };
    assert_eq!(json(&files[0]), json(&fixture("sd3_lora/peft_min/adapter_config.json")));
    // The same values give the same bytes.
    assert_eq!(fs::read(&write("again", Form::Peft)[1]).unwrap(), fs::read(&files[1]).unwrap());
}

#[test]
fn parity_of_a_merged_model() {
    let folder = tempfile::tempdir().unwrap();
    let trained = recorded("sd3_lora/peft");
    let io = tensors(&fixture("sd3_lora/io.safetensors"));
    let base = base(trained.lora.as_ref());
    let write = |name: &str, options: &Options| {
        let out = folder.path().join(name);
        (export(&trained, &Form::Merged(&base), &out, options), out)
    };
    let (files, whole) = write("whole", &Options::default());
    let names: Vec<_> = files.iter().map(|f| f.strip_prefix(&whole).unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]);
    let v = velocity_of(&whole);
    let error = max_error(&v, &io["out.v"]);
    eprintln!("merged: {error:.1e}");
    assert!(error <= 1e-5, "{error:.1e}");

    let (files, shards) = write("shards", &Options { shard_bytes: 100_000, ..Options::default() });
    assert_eq!(files.len(), 2 + 4, "{files:?}");
    assert_eq!(values(&velocity_of(&shards)), values(&v));
    for (dtype, tolerance) in [(DType::BF16, 3e-2), (DType::F16, 3e-3)] {
        let options = Options { dtype: Some(dtype), ..Options::default() };
        let (_, half) = write(dtype.as_str(), &options);
        let weights = Transformer::open(&half).unwrap().weights;
        assert!(weights.names().all(|name| weights.dtype(name) == Some(dtype)));
        let error = max_error(&velocity_of(&half), &io["out.v"]);
        eprintln!("merged {}: {error:.1e}", dtype.as_str());
        assert!(error <= tolerance && error > 0.0, "{error:.1e}");
    }
}

#[test]
fn another_scale_is_taken_over_and_another_rank_or_target_refused() {
    let adapter = Adapter::open(&fixture("sd3_lora/peft")).unwrap();
    assert_eq!((adapter.rank, adapter.scale(), adapter.modules().count()), (4, Some(2.0), 23));
    let flat = |config: LoraConfig| {
        let layout = Layout::new(&base(Some(&config)).model.specs(), Trainable::Lora);
        adapter.flat(&layout, &config, &Device::Cpu).map(|flat| Trained { lora: Some(config), layout, flat })
    };
    let io = tensors(&fixture("sd3_lora/io.safetensors"));
    let other = flat(LoraConfig { alpha: 3.0, ..lora() }).unwrap();
    assert!(max_error(&velocity_with(&other, &fixture("sd3_micro")), &io["out.v"]) <= 1e-5);
    let message = |config: LoraConfig| flat(config).err().unwrap().to_string();
    assert!(message(LoraConfig { rank: 8, ..lora() }).contains("is of rank 4, model.lora.rank is 8; set"));
    let message = message(LoraConfig { targets: vec!["attn.to_q".into(), "ff.net.2".into()], ..lora() });
    assert!(message.contains("transformer_blocks.0.ff.net.2.lora_A.weight [4, 96] is missing"), "{message}");
    assert!(message.contains("attn.to_k.lora_B.weight is not of this model"), "{message}");
    assert!(message.contains("model.lora.targets"), "{message}");
}

/// A folder with the recorded factors and a configuration that `change` has changed.
fn reconfigured(change: impl FnOnce(&mut serde_json::Value)) -> flowrl_dist::Result<Adapter> {
    let folder = tempfile::tempdir().unwrap();
    let recorded = fixture("sd3_lora/peft");
    fs::copy(recorded.join("adapter_model.safetensors"), folder.path().join("adapter_model.safetensors")).unwrap();
    let text = fs::read_to_string(recorded.join("adapter_config.json")).unwrap();
    let mut config = serde_json::from_str(&text).unwrap();
    change(&mut config);
    fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    Adapter::open(folder.path())
}

#[test]
fn a_configuration_that_means_another_function_is_refused() {
    for (key, value, wanted) in [
        ("use_dora", "true", "has use_dora = true, which is not supported"),
        ("peft_type", "\"LOHA\"", "has peft_type = \"LOHA\""),
        ("init_lora_weights", "\"pissa\"", "which changes the base weights too"),
        ("init_lora_weights", "\"pissa_niter_16\"", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "\"olora\"", "which changes the base weights too"),
        ("init_lora_weights", "\"corda\"", "which changes the base weights too"),
        ("init_lora_weights", "\"loftq\"", "which changes the base weights too"),
        ("init_lora_weights", "\"lora_ga\"", "which changes the base weights too"),
        ("init_lora_weights", "\"sapphire\"", "has init_lora_weights = \"sapphire\", which is not known"),
        ("bias", "\"lora_only\"", "has bias = \"lora_only\""),
        ("lora_bias", "true", "has lora_bias = true"),
        ("modules_to_save", "[\"proj_out\"]", "has modules_to_save = [\"proj_out\"]"),
        ("layer_replication", "[[0, 2], [1, 3]]", "has layer_replication"),
        ("kasa_config", "{\"beta\": 0.0001}", "has kasa_config"),
        ("use_better_lora", "1", "has use_better_lora = 1, a key that is not known here"),
        ("lora_alpha", "0", "has alpha 0 (lora_alpha); it must be a number above 0"),
        ("lora_alpha", "-8", "has alpha -8"),
        ("lora_alpha", "null", "is not a valid configuration of PEFT"),
        ("alpha_pattern", "{\"attn.to_q\": 0}", "has alpha 0 (attn.to_q)"),
        ("alpha_pattern", "{\"layers\\\\.[0-9]\": 4}", "a regular expression, which is not read"),
        (
            "rank_pattern",
            "{\"attn.to_q\": 2}",
            "is of rank 4, its configuration says 2 for transformer_blocks.0.attn.to_q",
        ),
        ("r", "5", "is of rank 4, its configuration says 5"),
    ] {
        let value = serde_json::from_str(value).unwrap();
        let message = reconfigured(|config| config[key] = value).unwrap_err().to_string();
        assert!(message.contains(wanted), "{key}: {message}");
    }
    for name in ["adapter_model.safetensors", "adapter_model.fp16.safetensors", "my_lora.safetensors"] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(name);
        fs::copy(fixture("sd3_lora/peft_min/adapter_model.safetensors"), &file).unwrap();
        for path in [folder.path(), &file] {
            let message = Adapter::open(path).unwrap_err().to_string();
            assert!(message.contains("has no adapter_config.json beside it"), "{name}: {message}");
        }
        let config = folder.path().join("adapter_config.json");
        let write = |start: &str| {
            let config = fs::read_to_string(fixture("sd3_lora/peft_min/adapter_config.json")).unwrap();
            let mut json: serde_json::Value = serde_json::from_str(&config).unwrap();
            json["init_lora_weights"] = start.into();
            fs::write(folder.path().join("adapter_config.json"), json.to_string()).unwrap();
        };
        write("gaussian");
        for path in [folder.path(), &file] {
            assert_eq!(Adapter::open(path).unwrap().scale(), Some(2.0), "alpha 8 over rank 4, {name}");
        }
        write("pissa_niter_16");
        let message = Adapter::open(&file).unwrap_err().to_string();
        assert!(message.contains("which changes the base weights too"), "{name}: {message}");
        fs::remove_file(&config).unwrap();
        std::os::unix::fs::symlink(folder.path().join("gone"), &config).unwrap();
        assert!(Adapter::open(&file).unwrap_err().to_string().contains("is a link to nothing"), "{name}");
    }
    let message = Adapter::open(&fixture("sd3_micro")).unwrap_err().to_string();
    assert!(message.contains("holds no *.lora_A.weight"), "{message}");
}

/// PEFT 0.21.2: `scaling` is alpha / r, or alpha / sqrt(r); `get_pattern_key` takes the first pattern that a name ends with.
#[test]
fn a_configuration_that_is_read_gives_each_module_its_scale() {
    let scale = |key: &str, value: serde_json::Value| reconfigured(|config| config[key] = value).unwrap().scale();
    assert_eq!(scale("use_rslora", true.into()), Some(4.0));
    for start in ["gaussian", "eva", "orthogonal", "mica"] {
        assert_eq!(scale("init_lora_weights", start.into()), Some(2.0), "{start}");
    }
    for (key, value) in
        [("lora_dropout", "0.1"), ("layers_to_transform", "[0]"), ("eva_config", "{\"rho\": 2.0}"), ("x", "[]")]
    {
        assert_eq!(scale(key, serde_json::from_str(value).unwrap()), Some(2.0), "{key}");
    }
    let patterns = serde_json::json!({"^transformer_blocks.0.attn.to_q": 2, "to_q": 12, "o_k": 1, "attn.to_k": 6});
    let adapter = reconfigured(|config| config["alpha_pattern"] = patterns).unwrap();
    let scale = |module: &str| adapter.scales[&format!("transformer_blocks.{module}")];
    assert_eq!([scale("0.attn.to_q"), scale("1.attn.to_q"), scale("1.attn.to_k")], [0.5, 3.0, 1.5]);
    assert_eq!((scale("1.attn.to_v"), adapter.scale()), (2.0, None));
    // A dot is any character: re.match(r"(.*\.)?(attn.to_.)$", "transformer_blocks.0.attn.to_q").
    let patterns = serde_json::json!({"^transformer_blocks.1.attn.to_v": 4, "s.0.attn.to_k": 1, "attn.to_.": 16});
    let adapter = reconfigured(|config| config["alpha_pattern"] = patterns).unwrap();
    let scale = |module: &str| adapter.scales[&format!("transformer_blocks.{module}")];
    assert_eq!([scale("0.attn.to_q"), scale("1.attn.to_v"), scale("0.attn.to_k")], [4.0, 1.0, 4.0]);
}

#[test]
fn an_export_is_whole_and_replaces_only_an_export() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let adapted = recorded("sd3_lora/peft");
    let base = base(adapted.lora.as_ref());
    let options = Options::default();
    let refused = |out: &Path, replace| Place::new(out, replace).err().unwrap().to_string();
    let replace = |form| adapted.write(&form, &Place::new(&out, true).unwrap(), &options).unwrap();
    fs::create_dir(&out).unwrap();
    export(&adapted, &Form::Diffusers, &out, &options);
    let held = refused(&out, false);
    assert!(held.contains("holds an export already; name another folder, or replace it with --force"), "{held}");
    replace(Form::Merged(&base));
    assert!(!out.join("pytorch_lora_weights.safetensors").exists() && out.join("transformer/config.json").is_file());
    // What a killed export leaves is in nobody's way.
    fs::create_dir(folder.path().join(".writing-out")).unwrap();
    replace(Form::Peft);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    fs::write(out.join("thesis.tex"), "all of it").unwrap();
    assert!(refused(&out, true).contains("holds thesis.tex, which no export has written"));
    assert!(out.join("adapter_model.safetensors").is_file());
    // A model that no export has written, though it looks like one.
    fs::create_dir_all(folder.path().join("model/transformer")).unwrap();
    assert!(refused(&folder.path().join("model"), true).contains("holds transformer, which no export has written"));

    let full = trained(|layout| Tensor::zeros(layout.total, DType::F32, &Device::Cpu).unwrap(), None);
    let fresh = folder.path().join("fresh");
    for form in [Form::Diffusers, Form::Peft] {
        let e = full.write(&form, &Place::new(&fresh, false).unwrap(), &options).unwrap_err();
        assert!(e.to_string().contains("there is no adapter; take --format merged"), "{e}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left of what failed");
}
