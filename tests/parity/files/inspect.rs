//! What `inspect` says of a model's folder, and what loading it says.

use super::common::*;
use candle_core::{DType, Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::config::RunConfig;
use flowrl_dist::model::files::describe;
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
    let damages: [(&str, Damage, &str); 9] = [
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
