//! The layouts of diffusers.

use super::common::*;
use candle_core::{DType, Device};
use flowrl_dist::model::files::{self, Format, Transformer, parts};
use std::fs;
use std::path::Path;

fn velocity_of(path: &Path) -> f64 {
    let loaded = Transformer::open(path).unwrap().load(None, LATENT, DType::F32, 0, &Device::Cpu).unwrap();
    let io = tensors(&fixture("sd3_micro/io.safetensors"));
    max_error(&velocity(&loaded.model, &loaded.params().unwrap(), &io), &io["out.v"])
}

#[test]
fn parity_of_the_diffusers_layouts() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let transformer = root.join("transformer");
    fs::create_dir(&transformer).unwrap();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        fs::copy(fixture("sd3_micro").join(file), transformer.join(file)).unwrap();
    }
    let file = transformer.join("diffusion_pytorch_model.safetensors");
    for (path, format) in
        [(root, Format::Pipeline), (transformer.as_path(), Format::Transformer), (file.as_path(), Format::Transformer)]
    {
        assert_eq!(Format::of(path).unwrap(), format);
        let error = velocity_of(path);
        eprintln!("{}: {error:.1e}", format.describe());
        assert!(error <= 1e-5, "{error:.1e}");
    }
    let (_, found) = parts(root).unwrap();
    let problems: Vec<_> = found.iter().filter_map(|p| Some(format!("{} {}", p.name, p.problem.as_ref()?))).collect();
    assert_eq!(problems.len(), 9, "{problems:?}");
    assert!(problems.contains(&"text_encoder_3 is absent".into()) && problems.contains(&"vae is absent".into()));

    // What the index sets to null is not missed.
    let index = r#"{"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder_3": [null, null]}"#;
    fs::write(root.join("model_index.json"), index).unwrap();
    let (_, found) = parts(root).unwrap();
    let state: Vec<_> = found.iter().map(|p| (p.name.as_str(), p.problem.as_deref())).collect();
    assert_eq!(state, [("transformer", None), ("vae", Some("is absent"))]);
}

#[test]
fn another_model_is_refused_with_all_that_differs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let mut micro = tensors(&fixture("sd3_micro/diffusion_pytorch_model.safetensors"));
    let refused = |micro: &Tensors| {
        write(&path, micro);
        Transformer::open(&path).unwrap_err().to_string()
    };
    let gone = micro.remove("transformer_blocks.1.attn.to_k.bias").unwrap();
    let moved = micro.remove("proj_out.weight").unwrap();
    micro.insert("proj_out.weight".into(), moved.t().unwrap().contiguous().unwrap());
    micro.insert("transformer_blocks.1.attn.to_k.bia".into(), gone);
    let message = refused(&micro);
    for part in [
        "3 tensors differ",
        "proj_out.weight is [24, 64], not [64, 24]",
        "transformer_blocks.1.attn.to_k.bias [24] is missing",
        "transformer_blocks.1.attn.to_k.bia is not of this model",
    ] {
        assert!(message.contains(part), "{message}");
    }
    micro.retain(|name, _| !name.contains("norm_q"));
    assert!(refused(&micro).contains("lacks transformer_blocks.0.attn.norm_q.weight"));
    micro.retain(|name, _| name.contains("norm_k"));
    assert!(refused(&micro).contains("is of no layout that is known here"));
}

#[test]
fn a_glyphs_file_is_no_transformer_of_stable_diffusion() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/glyphs/base.safetensors");
    assert_eq!(Format::of(&path).unwrap(), Format::Embedded(files::GLYPHS));
    let message = Transformer::open(&path).unwrap_err().to_string();
    assert!(message.contains("is a glyphs base model, not a transformer"), "{message}");
}
