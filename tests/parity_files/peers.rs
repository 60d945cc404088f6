//! Exports for `launch/check-export.sh`, which reads them with the real packages.

use crate::common::*;
use crate::lora::{lora, trained, velocity_of, velocity_with};
use candle_core::{DType, Device, Tensor};
use flowrl_dist::export::{Format, Options};
use flowrl_dist::model::files::{Transformer, open_part};
use flowrl_dist::params::{Layout, Trainable};
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
    assert_eq!(full.layout, Layout::new(&full.base.model.specs(), Trainable::Full));
    io.insert("ours.base".into(), velocity_of(&fixture("sd3_micro")));
    io.insert("ours.adapted".into(), velocity_with(&adapted, &fixture("sd3_micro")));
    io.insert("ours.full".into(), velocity_with(&full, &fixture("sd3_micro")));
    assert!(max_error(&io["ours.adapted"], &io["ours.base"]) > 0.05, "the adapter has an effect");

    for (name, format) in [("diffusers", Format::Diffusers), ("peft", Format::Peft)] {
        adapted.write(&out.join(name), &Options::of(format)).unwrap();
    }
    let shards = Options { shard_bytes: 100_000, ..Options::of(Format::Merged) };
    for (name, trained, options, wanted) in [
        ("merged", &adapted, Options::of(Format::Merged), "ours.adapted"),
        ("merged_shards", &adapted, shards, "ours.adapted"),
        ("merged_full", &full, Options::of(Format::Merged), "ours.full"),
    ] {
        trained.write(&out.join(name), &options).unwrap();
        let error = max_error(&velocity_of(&out.join(name)), &io[wanted]);
        eprintln!("{name}: {error:.1e}");
        assert!(error <= 1e-5, "{name}: {error:.1e}");
    }
    write(&out.join("single_file.safetensors"), &crate::sai::single_file());
    write(&out.join("vae_single_file.safetensors"), &crate::sai::vae_file());
    let vae = open_part(&out.join("vae_single_file.safetensors"), "vae").unwrap();
    let read = |name: &str| (name.to_owned(), vae.tensor(name, DType::F32, &Device::Cpu).unwrap());
    write(&out.join("vae.safetensors"), &vae.names().map(read).collect());
    write(&out.join("io.safetensors"), &io);
    fs::create_dir_all(out.join("base/transformer")).unwrap();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        fs::copy(fixture("sd3_micro").join(file), out.join("base/transformer").join(file)).unwrap();
    }
}
