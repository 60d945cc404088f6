//! Adapters with the names of other programs: what they make of the model is what the sum of base weights and products
//! makes of it, written by the authors' names.

use super::common::*;
use super::lora::{trained, velocity_of, velocity_with};
use super::sai::single_file;
use candle_core::{DType, Device, Tensor};
use flowrl_dist::model::files::{Adapter, Format};
use flowrl_dist::params::LoraConfig;
use std::fs;
use std::path::Path;

const RANK: usize = 3;

/// Every linear layer of the small model by diffusers' names, those of the second attention too.
const TARGETS: [&str; 24] = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "norm1.linear",
    "norm1_context.linear",
    "norm_out.linear",
    "proj_out",
    "context_embedder",
    "timestep_embedder.linear_1",
    "timestep_embedder.linear_2",
    "text_embedder.linear_1",
];

/// Factors for every linear layer of `single_file` but one, with an alpha of its own for each, and the sum.
fn adapted() -> (Vec<(String, Tensor, Tensor, f64)>, Tensors) {
    let mut sum = single_file();
    let mut names: Vec<String> = sum.keys().cloned().collect();
    names.sort();
    let mut factors = Vec::new();
    for name in names {
        let module = name.strip_suffix(".weight").and_then(|name| name.strip_prefix("model.diffusion_model."));
        let (Some(module), &[out, width]) = (module, sum[&name].dims()) else { continue };
        if module == "y_embedder.mlp.2" {
            continue;
        }
        let number = factors.len();
        let made = |rows: usize, columns: usize, shift: usize| {
            let value = |i: usize| ((i * 7 + number * 131 + shift) as f32 * 0.37).sin() * 0.2;
            let values: Vec<f32> = (0..rows * columns).map(value).collect();
            Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
        };
        let (a, b, alpha) = (made(RANK, width, 1), made(out, RANK, 2), 1.0 + (number % 4) as f64);
        let update = (b.matmul(&a).unwrap() * (alpha / RANK as f64)).unwrap();
        let weight = (&sum[&name] + update).unwrap();
        sum.insert(name.clone(), weight);
        factors.push((module.to_owned(), a, b, alpha));
    }
    (factors, sum)
}

/// The velocity with the adapter at `path`.
fn velocity_of_adapter(path: &Path) -> Tensor {
    let adapter = Adapter::open(path).unwrap();
    let lora = LoraConfig { rank: RANK, alpha: 6.0, targets: TARGETS.map(String::from).to_vec() };
    let trained = trained(|layout| adapter.flat(layout, &lora, &Device::Cpu).unwrap(), Some(lora.clone()));
    velocity_with(&trained, &fixture("sd3_micro"))
}

#[test]
fn parity_of_adapters_by_other_names_with_the_sum() {
    let folder = tempfile::tempdir().unwrap();
    let (factors, sum) = adapted();
    write(&folder.path().join("sum.safetensors"), &sum);
    let wanted = velocity_of(&folder.path().join("sum.safetensors"));
    assert!(max_error(&velocity_of(&fixture("sd3_micro")), &wanted) > 0.05, "the adapter has an effect");
    let path = folder.path().join("adapter.safetensors");
    for (format, prefix, dots, ends) in [
        (Format::KohyaAdapter, "lora_unet_", "_", ["lora_down", "lora_up"]),
        (Format::ComfyAdapter, "diffusion_model.", ".", ["lora_A", "lora_B"]),
        (Format::ComfyAdapter, "diffusion_model.", ".", ["lora_down", "lora_up"]),
    ] {
        let mut file = Tensors::new();
        for (module, a, b, alpha) in &factors {
            let module = format!("{prefix}{}", module.replace('.', dots));
            file.insert(format!("{module}.{}.weight", ends[0]), a.clone());
            file.insert(format!("{module}.{}.weight", ends[1]), b.clone());
            file.insert(format!("{module}.alpha"), Tensor::new(*alpha as f32, &Device::Cpu).unwrap());
        }
        write(&path, &file);
        assert_eq!(Format::of(&path).unwrap(), format);
        assert_eq!(Adapter::open(&path).unwrap().scale(), None, "each module has its own");
        let error = max_error(&velocity_of_adapter(&path), &wanted);
        eprintln!("{} {}: {error:.1e}", format.describe(), ends[0]);
        assert!(error <= 1e-5, "{error:.1e}");
    }
}

/// Names of diffusers with `_` for dots, and alphas that an integer holds.
#[test]
fn kohyas_underscores_before_our_names_and_whole_alphas_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let file = |alpha: Tensor| {
        let matrix = Tensor::ones((4, 4), DType::F32, &Device::Cpu).unwrap();
        let module = "lora_transformer_transformer_blocks_11_attn_to_out_0";
        let file = Tensors::from([
            (format!("{module}.lora_down.weight"), matrix.clone()),
            (format!("{module}.lora_up.weight"), matrix),
            (format!("{module}.alpha"), alpha),
        ]);
        write(&path, &file);
        Adapter::open(&path)
    };
    let adapter = file(Tensor::new(2i64, &Device::Cpu).unwrap()).unwrap();
    assert_eq!(adapter.modules().collect::<Vec<_>>(), ["transformer_blocks.11.attn.to_out.0"]);
    assert_eq!(adapter.scale(), Some(0.5));
    for (alpha, wanted) in [(0.0, "alpha = 0; an alpha must be above 0"), (f64::NAN, "alpha is NaN")] {
        let message = file(Tensor::new(alpha, &Device::Cpu).unwrap()).unwrap_err().to_string();
        assert!(message.contains(wanted), "{message}");
    }
}

/// What else is in an adapter's file, and what is said of it.
#[test]
fn every_tensor_of_an_adapter_is_used_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let factors = tensors(&fixture("sd3_lora/diffusers/pytorch_lora_weights.safetensors"));
    let matrix = |dtype| Tensor::ones((4, 4), dtype, &Device::Cpu).unwrap();
    let module = "transformer.transformer_blocks.0.ff.net.2";
    for (name, tensor, wanted) in [
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", matrix(DType::F32), "text encoder"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", matrix(DType::F32), "1 tensors of a text"),
        (&format!("{module}.lora_A.weight"), matrix(DType::F32), "lacks transformer_blocks.0.ff.net.2.lora_B.weight"),
        (&format!("{module}.dora_scale"), matrix(DType::F32), "of DoRA"),
        (&format!("{module}.hada_w1_a"), matrix(DType::F32), "of LoHa"),
        (&format!("{module}.lora_B.bias"), matrix(DType::F32), "of a bias beside the factors"),
        ("transformer.proj_out.weight", matrix(DType::F32), "which is no factor of a LoRA"),
        (
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
            matrix(DType::F32),
            "of no layer of Stable",
        ),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", matrix(DType::F32), "of no layer of Stable"),
        (
            "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight",
            matrix(DType::F32),
            "which are the same tensor",
        ),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", matrix(DType::U8), "is of type U8, which is not"),
        (
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
            Tensor::ones(4, DType::F32, &Device::Cpu).unwrap(),
            "not [rank, in]",
        ),
        (&format!("{module}.alpha"), Tensor::new(2f32, &Device::Cpu).unwrap(), "and no factors of it"),
    ] {
        let mut file = factors.clone();
        file.insert(name.to_owned(), tensor);
        write(&path, &file);
        let message = Adapter::open(&path).unwrap_err().to_string();
        assert!(message.contains(wanted), "{name}: {message}");
    }
    // Another rank at one module.
    let mut file = factors.clone();
    for (end, shape) in [("lora_A", (2, 24)), ("lora_B", (24, 2))] {
        let name = format!("transformer.transformer_blocks.0.attn.to_q.{end}.weight");
        file.insert(name, Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap());
    }
    write(&path, &file);
    let message = Adapter::open(&path).unwrap_err().to_string();
    assert!(message.contains("has rank 4 and, at transformer_blocks.0.attn.to_q, rank 2"), "{message}");
}

/// The layouts of checkpoints and of folders with two adapters.
#[test]
fn a_folder_that_holds_its_adapter_inside_or_two_of_them_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let copy = |to: &str, files: &[&str]| {
        fs::create_dir_all(root.join(to)).unwrap();
        for file in files {
            let name = Path::new(file).file_name().unwrap();
            fs::copy(fixture("sd3_lora").join(file), root.join(to).join(name)).unwrap();
        }
    };
    copy("checkpoint-60/lora", &["peft/adapter_config.json", "peft/adapter_model.safetensors"]);
    fs::write(root.join("checkpoint-60/optimizer.pt"), "x").unwrap();
    for message in
        [Adapter::open(&root.join("checkpoint-60")).unwrap_err(), Format::of(&root.join("checkpoint-60")).unwrap_err()]
    {
        assert!(message.to_string().ends_with("checkpoint-60/lora"), "{message}");
    }
    copy("two", &["peft/adapter_config.json", "peft/adapter_model.safetensors"]);
    copy("two", &["diffusers/pytorch_lora_weights.safetensors"]);
    let message = Adapter::open(&root.join("two")).unwrap_err().to_string();
    assert!(message.contains("adapter_model.safetensors and ") && message.contains("holds two adapters"), "{message}");
    Adapter::open(&root.join("two/adapter_model.safetensors")).unwrap();
}
