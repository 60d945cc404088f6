//! What `inspect` says of a model's folder, and what loading it says.

use super::common::*;
use candle_core::{DType, Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::config::RunConfig;
use flowrl_dist::model::files::{describe, digests};
use flowrl_dist::model::random;
use flowrl_dist::model::text::{Encoding, TextEncoders};
use flowrl_dist::pipeline::Pipeline;
use safetensors::tensor::{Dtype, TensorView};
use std::fs;
use std::path::Path;

/// Everything that a run reads of the folder.
fn load(root: &Path) -> Result<()> {
    let set = [format!("model.path={}", root.display()), format!("model.prompt_cache={}/cache", root.display())];
    let config = RunConfig::load(Some(Path::new("configs/sd35/tiny.toml")), &set)?.model;
    config.check_files()?;
    Pipeline::load(&config, 1, &Device::Cpu)?.params()?;
    let encoding = Encoding { folder: root.to_path_buf(), t5_tokens: config.t5_tokens, dtype: DType::F32 };
    TextEncoders::load(&encoding, &Device::Cpu).map(drop)
}

/// Changes one tensor of a file.
fn change(path: &Path, name: &str, change: impl FnOnce(&Tensor) -> Tensor) {
    let mut file = tensors(path);
    let changed = change(&file[name]);
    file.insert(name.into(), changed);
    write(path, &file);
}

/// Stores one tensor as bytes of the type `dtype`.
fn retype(path: &Path, name: &str, dtype: Dtype) {
    let file = tensors(path);
    let bytes: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = file
        .iter()
        .map(|(key, tensor)| match key == name {
            true => (key.clone(), dtype, tensor.dims().to_vec(), vec![1; tensor.elem_count()]),
            false => {
                let bytes = values(tensor).into_iter().flat_map(f32::to_le_bytes).collect();
                (key.clone(), Dtype::F32, tensor.dims().to_vec(), bytes)
            }
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, dtype, shape, data)| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn set(path: &Path, key: &str, value: usize) {
    let mut config: serde_json::Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    config[key] = value.into();
    fs::write(path, config.to_string()).unwrap();
}

/// A token that the tokenizer knows and its encoder does not.
fn too_many_tokens(tokenizer: &Path) {
    let path = tokenizer.join("vocab.json");
    let mut vocabulary: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    vocabulary["one-too-many</w>"] = 999_999.into();
    fs::write(path, vocabulary.to_string()).unwrap();
}

#[test]
fn inspect_passes_what_loads_and_refuses_what_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let (root, aside) = (folder.path().join("model"), folder.path().join("aside"));
    random::write(random::Size::Tiny, 1, &root, &|_| {}).unwrap();
    let problems = |values: bool| -> Vec<String> {
        let parts = describe(&root, values).unwrap().parts;
        parts.into_iter().filter_map(|part| Some(format!("{}: {}", part.name, part.problem?))).collect()
    };
    assert_eq!(problems(true), [""; 0]);
    load(&root).unwrap();

    type Damage = fn(&Path);
    let transformer = "diffusion_pytorch_model.safetensors";
    let damages: [(&str, Damage, &str); 10] = [
        (
            "transformer",
            |part| retype(&part.join("diffusion_pytorch_model.safetensors"), "proj_out.weight", Dtype::F8_E5M2),
            "type F8_E5M2",
        ),
        (
            "vae",
            |part| retype(&part.join("diffusion_pytorch_model.safetensors"), "decoder.conv_in.bias", Dtype::I8),
            "type I8",
        ),
        ("vae", |part| set(&part.join("config.json"), "latent_channels", 8), "tensors differ"),
        ("text_encoder", |part| set(&part.join("config.json"), "num_hidden_layers", 3), "is missing"),
        ("text_encoder_3", |part| set(&part.join("config.json"), "d_ff", 8), "tensors differ"),
        ("text_encoder_2", |part| fs::remove_file(part.join("config.json")).unwrap(), "config.json"),
        (
            "tokenizer_3",
            |part| fs::rename(part.join("tokenizer.json"), part.join("spiece.model")).unwrap(),
            "holds spiece.model but no tokenizer.json",
        ),
        ("tokenizer", |part| fs::write(part.join("vocab.json"), "{").unwrap(), "cannot be read"),
        ("tokenizer_2", too_many_tokens, "/tokenizer_2: makes tokens up to 999999, and its encoder knows"),
        ("transformer", |part| fs::write(part.join("config.json"), "{}").unwrap(), "config.json"),
    ];
    for (name, damage, wanted) in damages {
        let part = root.join(name);
        fs::create_dir_all(&aside).unwrap();
        for entry in fs::read_dir(&part).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, aside.join(path.file_name().unwrap())).unwrap();
        }
        damage(&part);
        let said = problems(false);
        assert!(said.len() == 1 && said[0].starts_with(&format!("{name}: ")), "{name}: {said:?}");
        assert!(said[0].contains(wanted), "{name}: {said:?}");
        let refused = load(&root).unwrap_err().to_string();
        assert!(refused.contains(wanted), "{name}: {refused}");
        fs::remove_dir_all(&part).unwrap();
        fs::rename(&aside, &part).unwrap();
    }

    // A scheduler of another grid: refused as well where the run says no shift of its own.
    let scheduler = root.join("scheduler/scheduler_config.json");
    let whole = fs::read(&scheduler).unwrap();
    let deep = "[".repeat(300_000);
    for (text, wanted) in [
        (r#"{"_class_name": "DPMSolverMultistepScheduler"}"#, "_class_name = \"DPMSolverMultistepScheduler\": "),
        (r#"{"use_dynamic_shifting": true}"#, "use_dynamic_shifting = true: "),
        (r#"{"use_karras_sigmas": true}"#, "use_karras_sigmas = true: "),
        ("[]", "is not a scheduler's configuration"),
        (deep.as_str(), "is not a scheduler's configuration"),
    ] {
        fs::write(&scheduler, text).unwrap();
        let said = problems(false);
        assert!(said.len() == 1 && said[0].starts_with("scheduler: ") && said[0].contains(wanted), "{said:?}");
        assert!(load(&root).unwrap_err().to_string().contains(wanted), "{wanted}");
    }
    fs::remove_file(&scheduler).unwrap();
    let refused = |wanted: &str| {
        let said = problems(false);
        assert!(said.len() == 1 && said[0].starts_with("scheduler: ") && said[0].contains(wanted), "{said:?}");
        assert!(load(&root).unwrap_err().to_string().contains(wanted), "{wanted}");
    };
    std::os::unix::fs::symlink(root.join("gone"), &scheduler).unwrap();
    refused("is a link to nothing");
    fs::remove_file(&scheduler).unwrap();
    fs::create_dir(&scheduler).unwrap();
    refused("is a folder, not a file");
    fs::remove_dir(&scheduler).unwrap();
    fs::write(&scheduler, whole).unwrap();
    load(&root).unwrap();

    // A number that is none: seen where values are looked at, and when they are read.
    for (name, file, tensor) in [
        ("transformer", transformer, "proj_out.bias"),
        ("vae", transformer, "decoder.conv_in.bias"),
        ("text_encoder_3", "model.safetensors", "encoder.final_layer_norm.weight"),
    ] {
        let path = root.join(name).join(file);
        let whole = fs::read(&path).unwrap();
        change(&path, tensor, |t| (t.zeros_like().unwrap() + f64::NAN).unwrap());
        assert_eq!(problems(false), [""; 0]);
        let wanted = format!("{}: {tensor} holds NaN", path.display());
        assert!(problems(true)[0].contains(&wanted), "{:?}", problems(true));
        let refused = load(&root).unwrap_err().to_string();
        assert!(refused.starts_with(&wanted), "{refused}");
        fs::write(&path, whole).unwrap();
    }

    // A whole part of another model.
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture("clip_l_micro").join(file), root.join("text_encoder_2").join(file)).unwrap();
    }
    let wanted = "makes 56 features together with text_encoder, the transformer wants 64";
    assert!(problems(false)[0].ends_with(wanted), "{:?}", problems(false));
    assert!(load(&root).unwrap_err().to_string().contains(wanted));
}

/// Two folders that make other pictures of the same latents, or read something else of a prompt, have other digests, by the
/// part's name; who wrote a configuration, and how, is no matter.
#[test]
fn the_digest_of_each_part_is_of_what_it_computes() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("model");
    random::write(random::Size::Tiny, 1, &root, &|_| {}).unwrap();
    let whole = digests(&root).unwrap();
    assert_eq!(whole.len(), 7);
    let differing = || -> Vec<&str> {
        let now = digests(&root).unwrap();
        whole.iter().filter(|(name, digest)| now[*name] != **digest).map(|(name, _)| *name).collect()
    };
    let with = |path: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let path = root.join(path);
        let before = fs::read(&path).unwrap();
        let mut json = serde_json::from_slice(&before).unwrap();
        change(&mut json);
        fs::write(&path, json.to_string()).unwrap();
        let differing = differing();
        fs::write(&path, before).unwrap();
        differing
    };
    assert_eq!(with("vae/config.json", &|json| json["scaling_factor"] = 1.25.into()), ["vae"]);
    assert_eq!(with("text_encoder_2/config.json", &|json| json["layer_norm_eps"] = 1e-4.into()), ["text_encoder_2"]);
    assert_eq!(with("tokenizer/tokenizer_config.json", &|json| json["pad_token"] = "a</w>".into()), ["tokenizer"]);
    assert_eq!(with("vae/config.json", &|json| json["_diffusers_version"] = "0.99".into()), [""; 0]);
    assert_eq!(with("text_encoder/config.json", &|json| json["transformers_version"] = "9".into()), [""; 0]);
    let list = with("model_index.json", &|json| json["text_encoder_3"] = serde_json::json!([null, null]));
    assert_eq!(list, ["text_encoder_3", "tokenizer_3"]);
    let (one, other) = (root.join("text_encoder"), root.join("text_encoder_2"));
    fs::rename(&one, folder.path().join("aside")).unwrap();
    fs::rename(&other, &one).unwrap();
    fs::rename(folder.path().join("aside"), &other).unwrap();
    assert_eq!(differing(), ["text_encoder", "text_encoder_2"]);
    fs::remove_dir_all(root.join("vae")).unwrap();
    assert!(digests(&root).is_err());
}
