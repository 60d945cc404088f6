//! Exports for `launch/check-export.sh`, which reads them with the real packages.

use super::common::*;
use super::lora::{base, export, lora, trained, velocity_of, velocity_with};
use candle_core::{DType, Device, Tensor};
use flowrl_dist::export::{Base, Form, Options, Trained};
use flowrl_dist::model::files::{Transformer, open_part};
use flowrl_dist::model::random;
use flowrl_dist::params::{Layout, Trainable};
use flowrl_dist::pipeline::{Kind, ModelConfig};
use flowrl_dist::rng::{Purpose, Stream};
use std::fs;
use std::path::Path;

fn noise(layout: &Layout, std: f64) -> Tensor {
    let values = Stream::new(11, Purpose::Parameters, [0; 4]).normals(layout.total);
    (Tensor::from_vec(values, layout.total, &Device::Cpu).unwrap() * std).unwrap()
}

/// Every export of the small model with a random adapter and of a random full fine-tune, with our velocities.
#[test]
fn exports_read_by_ourselves_give_the_same_velocity() {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("exports");
    if out.exists() {
        fs::remove_dir_all(&out).unwrap();
    }
    fs::create_dir_all(&out).unwrap();
    let mut io = tensors(&fixture("sd3_lora/io.safetensors"));
    io.retain(|name, _| name.starts_with("in."));

    let adapted = trained(|layout| noise(layout, 0.3), Some(lora()));
    let full = trained(
        |layout| {
            let transformer = Transformer::open(&fixture("sd3_micro")).unwrap();
            let loaded = transformer.load(None, LATENT, DType::F32, 0, &Device::Cpu).unwrap();
            (loaded.params().unwrap().flatten(layout).unwrap() + noise(layout, 0.02)).unwrap()
        },
        None,
    );
    let (adapted_base, full_base) = (base(adapted.lora.as_ref()), base(None));
    assert_eq!(full.layout, Layout::new(&full_base.model.specs(), Trainable::Full));
    io.insert("ours.base".into(), velocity_of(&fixture("sd3_micro")));
    io.insert("ours.adapted".into(), velocity_with(&adapted, &fixture("sd3_micro")));
    io.insert("ours.full".into(), velocity_with(&full, &fixture("sd3_micro")));
    assert!(max_error(&io["ours.adapted"], &io["ours.base"]) > 0.05, "the adapter has an effect");

    for (name, form) in [("diffusers", Form::Diffusers), ("peft", Form::Peft)] {
        export(&adapted, &form, &out.join(name), &Options::default());
    }
    let shards = Options { shard_bytes: 100_000, ..Options::default() };
    for (name, trained, base, options, wanted) in [
        ("merged", &adapted, &adapted_base, Options::default(), "ours.adapted"),
        ("merged_shards", &adapted, &adapted_base, shards, "ours.adapted"),
        ("merged_full", &full, &full_base, Options::default(), "ours.full"),
    ] {
        export(trained, &Form::Merged(base), &out.join(name), &options);
        let error = max_error(&velocity_of(&out.join(name)), &io[wanted]);
        eprintln!("{name}: {error:.1e}");
        assert!(error <= 1e-5, "{name}: {error:.1e}");
    }
    write(&out.join("single_file.safetensors"), &super::sai::single_file());
    write(&out.join("vae_single_file.safetensors"), &super::sai::vae_file());
    let vae = open_part(&out.join("vae_single_file.safetensors"), "vae").unwrap();
    let read = |name: &str| (name.to_owned(), vae.tensor(name, DType::F32, &Device::Cpu).unwrap());
    write(&out.join("vae.safetensors"), &vae.names().map(read).collect());
    write(&out.join("io.safetensors"), &io);
    pipeline(&out);
    fs::create_dir_all(out.join("base/transformer")).unwrap();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        fs::copy(fixture("sd3_micro").join(file), out.join("base/transformer").join(file)).unwrap();
    }
}

/// A whole pipeline with a random adapter in its transformer, and the transformer's velocity on random inputs.
fn pipeline(out: &Path) {
    let model = out.join("pipeline_base");
    random::write(random::Size::Tiny, 1, &model, &|_| {}).unwrap();
    let config = ModelConfig {
        kind: Kind::named("sd35-medium").unwrap(),
        path: Some(model),
        trainable: Trainable::Lora,
        ..ModelConfig::default()
    };
    let (base, lora) = (Base::of(&config).unwrap(), config.adapters());
    let layout = Layout::new(&base.model.specs(), Trainable::Lora);
    let adapted = Trained { lora: lora.clone(), flat: noise(&layout, 0.3), layout };
    let merged = out.join("pipeline");
    let files = export(&adapted, &Form::Merged(&base), &merged, &Options::default());
    assert!(files.contains(&merged.join("text_encoder_3/model.safetensors")), "{files:?}");
    assert!(files.contains(&merged.join("model_index.json")) && files.iter().all(|file| file.is_file()), "{files:?}");

    let transformer = Transformer::open(&config.path.unwrap()).unwrap();
    let sizes = &transformer.config;
    let normal = |shape: &[usize]| {
        let values =
            Stream::new(12, Purpose::Parameters, [shape.len() as u64, 0, 0, 0]).normals(shape.iter().product());
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let mut io = Tensors::from(
        [
            ("in.xt", normal(&[2, sizes.in_channels, LATENT.0, LATENT.1])),
            ("in.encoder_hidden_states", normal(&[2, 9, sizes.joint_attention_dim])),
            ("in.pooled", normal(&[2, sizes.pooled_projection_dim])),
            ("in.timestep", Tensor::new(&[900f32, 250.0], &Device::Cpu).unwrap()),
        ]
        .map(|(name, tensor)| (name.to_owned(), tensor)),
    );
    let loaded = transformer.load(lora.as_ref(), LATENT, DType::F32, 0, &Device::Cpu).unwrap();
    let base = loaded.params().unwrap();
    let ours = velocity(&loaded.model, &base.with_flat(&adapted.layout, &adapted.flat).unwrap(), &io);
    assert!(max_error(&ours, &velocity(&loaded.model, &base, &io)) > 0.05, "the adapter has an effect");
    io.insert("ours.velocity".into(), ours);
    write(&out.join("pipeline_io.safetensors"), &io);
}
