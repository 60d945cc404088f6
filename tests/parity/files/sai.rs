//! The authors' single file: written here by an inverse of our own, tensor by tensor, from the definition of the layout.

use super::common::*;
use candle_core::{DType, Device, Tensor};
use flowrl_dist::model::files::{Format, Transformer, open_part, parts};
use std::collections::BTreeSet;

/// Takes tensors out of a model by diffusers' names and puts them into one by the authors'.
struct Inverse {
    from: Tensors,
    to: Tensors,
}

impl Inverse {
    fn take(&mut self, name: &str) -> Tensor {
        self.from.remove(name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// A linear layer, or its rows' halves swapped.
    fn linear(&mut self, ours: &str, theirs: &str, swapped: bool) {
        for end in ["weight", "bias"] {
            let mut tensor = self.take(&format!("{ours}.{end}"));
            if swapped {
                let half = tensor.dim(0).unwrap() / 2;
                let [scale, shift] = [0, half].map(|start| tensor.narrow(0, start, half).unwrap());
                tensor = Tensor::cat(&[shift, scale], 0).unwrap();
            }
            self.to.insert(format!("model.diffusion_model.{theirs}.{end}"), tensor);
        }
    }

    fn fused(&mut self, block: usize, ours: [&str; 3], theirs: &str) {
        for end in ["weight", "bias"] {
            let parts = ours.map(|name| self.take(&format!("transformer_blocks.{block}.{name}.{end}")));
            let name = format!("model.diffusion_model.joint_blocks.{block}.{theirs}.{end}");
            self.to.insert(name, Tensor::cat(&parts, 0).unwrap());
        }
    }

    fn norm(&mut self, block: usize, ours: &str, theirs: &str) {
        let tensor = self.take(&format!("transformer_blocks.{block}.{ours}.weight"));
        self.to.insert(format!("model.diffusion_model.joint_blocks.{block}.{theirs}.weight"), tensor);
    }
}

/// sd3_micro as its authors would write it: three blocks, the first with a second attention.
pub fn single_file() -> Tensors {
    by_authors("sd3_micro")
}

/// A fixture of three blocks as its authors would write it.
fn by_authors(name: &str) -> Tensors {
    let from = tensors(&fixture(&format!("{name}/diffusion_pytorch_model.safetensors")));
    let mut inverse = Inverse { from, to: Tensors::new() };
    let i = &mut inverse;
    let table = i.take("pos_embed.pos_embed");
    i.to.insert("model.diffusion_model.pos_embed".into(), table);
    i.linear("pos_embed.proj", "x_embedder.proj", false);
    i.linear("context_embedder", "context_embedder", false);
    for (number, layer) in [(0, "linear_1"), (2, "linear_2")] {
        i.linear(&format!("time_text_embed.timestep_embedder.{layer}"), &format!("t_embedder.mlp.{number}"), false);
        i.linear(&format!("time_text_embed.text_embedder.{layer}"), &format!("y_embedder.mlp.{number}"), false);
    }
    for block in 0..3 {
        let (ours, theirs) = (format!("transformer_blocks.{block}"), format!("joint_blocks.{block}"));
        let last = block == 2;
        i.linear(&format!("{ours}.norm1.linear"), &format!("{theirs}.x_block.adaLN_modulation.1"), false);
        i.linear(&format!("{ours}.norm1_context.linear"), &format!("{theirs}.context_block.adaLN_modulation.1"), last);
        i.fused(block, ["attn.to_q", "attn.to_k", "attn.to_v"], "x_block.attn.qkv");
        i.fused(block, ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"], "context_block.attn.qkv");
        i.norm(block, "attn.norm_q", "x_block.attn.ln_q");
        i.norm(block, "attn.norm_k", "x_block.attn.ln_k");
        i.norm(block, "attn.norm_added_q", "context_block.attn.ln_q");
        i.norm(block, "attn.norm_added_k", "context_block.attn.ln_k");
        i.linear(&format!("{ours}.attn.to_out.0"), &format!("{theirs}.x_block.attn.proj"), false);
        i.linear(&format!("{ours}.ff.net.0.proj"), &format!("{theirs}.x_block.mlp.fc1"), false);
        i.linear(&format!("{ours}.ff.net.2"), &format!("{theirs}.x_block.mlp.fc2"), false);
        if !last {
            i.linear(&format!("{ours}.attn.to_add_out"), &format!("{theirs}.context_block.attn.proj"), false);
            i.linear(&format!("{ours}.ff_context.net.0.proj"), &format!("{theirs}.context_block.mlp.fc1"), false);
            i.linear(&format!("{ours}.ff_context.net.2"), &format!("{theirs}.context_block.mlp.fc2"), false);
        }
        if i.from.contains_key(&format!("{ours}.attn2.to_q.weight")) {
            i.fused(block, ["attn2.to_q", "attn2.to_k", "attn2.to_v"], "x_block.attn2.qkv");
            i.norm(block, "attn2.norm_q", "x_block.attn2.ln_q");
            i.norm(block, "attn2.norm_k", "x_block.attn2.ln_k");
            i.linear(&format!("{ours}.attn2.to_out.0"), &format!("{theirs}.x_block.attn2.proj"), false);
        }
    }
    i.linear("norm_out.linear", "final_layer.adaLN_modulation.1", true);
    i.linear("proj_out", "final_layer.linear", false);
    assert!(i.from.is_empty(), "{:?}", i.from.keys());
    inverse.to
}

/// Of Large's layout: no block has a second attention, and the table of positions has a side of its own.
#[test]
fn parity_of_the_single_file_of_large() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sd3.5_large.safetensors");
    write(&path, &by_authors("sd3_large_micro"));
    let [single, diffusers] =
        [path.as_path(), &fixture("sd3_large_micro")].map(|path| Transformer::open(path).unwrap());
    assert_eq!(single.config.release().map(|release| release.kind), Some("sd35-large"));
    assert_eq!((single.config.pos_embed_max_size, diffusers.config.pos_embed_max_size), (7, 7));
    let io = tensors(&fixture("sd3_large_micro/io.safetensors"));
    let [a, b] = [single, diffusers].map(|transformer| {
        let loaded = transformer.load(None, LATENT, DType::F32, 0, &Device::Cpu).unwrap();
        velocity(&loaded.model, &loaded.params().unwrap(), &io)
    });
    assert_eq!(values(&a), values(&b), "not a bit differs");
    assert!(max_error(&a, &io["out.v"]) <= 1e-5);
}

#[test]
fn parity_of_the_single_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sd3.5_medium.safetensors");
    let mut file = single_file();
    write(&path, &file);
    assert_eq!(Format::of(&path).unwrap(), Format::SingleFile);
    let transformer = Transformer::open(&path).unwrap();
    assert_eq!((transformer.config.num_attention_heads, transformer.config.attention_head_dim), (3, 8));
    assert_eq!(transformer.config.dual_attention_layers, [0]);
    let theirs = Transformer::open(&fixture("sd3_micro")).unwrap();
    let load = |t: &Transformer| t.load(None, LATENT, DType::F32, 0, &Device::Cpu).unwrap();
    let (ours, theirs) = (load(&transformer), load(&theirs));
    let io = tensors(&fixture("sd3_micro/io.safetensors"));
    let (a, b) =
        (velocity(&ours.model, &ours.params().unwrap(), &io), velocity(&theirs.model, &theirs.params().unwrap(), &io));
    assert_eq!(values(&a), values(&b), "not a bit differs");
    let error = max_error(&a, &io["out.v"]);
    eprintln!("single file: {error:.1e}");
    assert!(error <= 1e-5);

    // Without the prefix it is the same model; a tensor that nobody knows, or one less, is an error.
    let bare = |file: &Tensors| -> Tensors {
        file.iter().map(|(k, t)| (k.trim_start_matches("model.diffusion_model.").to_owned(), t.clone())).collect()
    };
    write(&path, &bare(&file));
    let again = load(&Transformer::open(&path).unwrap());
    assert_eq!(values(&velocity(&again.model, &again.params().unwrap(), &io)), values(&b));
    let stray = file.remove("model.diffusion_model.joint_blocks.1.x_block.attn.proj.bias").unwrap();
    file.insert("model.diffusion_model.joint_blocks.1.x_block.attn.proj.bia".into(), stray);
    write(&path, &file);
    let message = Transformer::open(&path).unwrap_err().to_string();
    assert!(message.contains("transformer_blocks.1.attn.to_out.0.bias [24] is missing"), "{message}");
    assert!(message.contains("joint_blocks.1.x_block.attn.proj.bia is not of this model"), "{message}");
}

/// Names in a VAE of four resolutions, (diffusers', theirs), from the two definitions side by side.
fn vae_names() -> Vec<(String, String)> {
    let mut names = Vec::new();
    let mut layer = |ours: String, theirs: String| {
        for end in ["weight", "bias"] {
            names.push((format!("{ours}.{end}"), format!("{theirs}.{end}")));
        }
    };
    for side in ["encoder", "decoder"] {
        for name in ["conv_in", "conv_out"] {
            layer(format!("{side}.{name}"), format!("{side}.{name}"));
        }
        layer(format!("{side}.conv_norm_out"), format!("{side}.norm_out"));
        for (ours, theirs) in
            [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")]
        {
            layer(format!("{side}.mid_block.attentions.0.{ours}"), format!("{side}.mid.attn_1.{theirs}"));
        }
        let resnet = ["norm1", "conv1", "norm2", "conv2"];
        for (ours, theirs) in [(0, 1), (1, 2)] {
            for part in resnet {
                layer(format!("{side}.mid_block.resnets.{ours}.{part}"), format!("{side}.mid.block_{theirs}.{part}"));
            }
        }
        for level in 0..4 {
            let (ours, theirs, blocks) = match side {
                "encoder" => (format!("encoder.down_blocks.{level}"), format!("encoder.down.{level}"), 2),
                _ => (format!("decoder.up_blocks.{}", 3 - level), format!("decoder.up.{level}"), 3),
            };
            for block in 0..blocks {
                for part in resnet {
                    layer(format!("{ours}.resnets.{block}.{part}"), format!("{theirs}.block.{block}.{part}"));
                }
            }
            layer(format!("{ours}.resnets.0.conv_shortcut"), format!("{theirs}.block.0.nin_shortcut"));
            if side == "encoder" {
                layer(format!("{ours}.downsamplers.0.conv"), format!("{theirs}.downsample.conv"));
            } else {
                layer(format!("{ours}.upsamplers.0.conv"), format!("{theirs}.upsample.conv"));
            }
        }
    }
    names
}

/// A VAE by its authors' names, every tensor filled with its number.
pub fn vae_file() -> Tensors {
    let tensor = |(number, (_, theirs)): (usize, (String, String))| {
        let tensor = Tensor::full(number as f32, 4, &Device::Cpu).unwrap();
        let is_convolution = theirs.contains("attn_1") && !theirs.contains("norm") && theirs.ends_with("weight");
        let tensor = if is_convolution { tensor.reshape((2, 2, 1, 1)).unwrap() } else { tensor };
        (format!("first_stage_model.{theirs}"), tensor)
    };
    vae_names().into_iter().enumerate().map(tensor).collect()
}

#[test]
fn the_vae_of_a_single_file_has_diffusers_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sd3.5_medium.safetensors");
    let names = vae_names();
    let mut file = single_file();
    file.extend(vae_file());
    write(&path, &file);
    let vae = open_part(&path, "vae").unwrap();
    let ours: BTreeSet<_> = names.iter().map(|(ours, _)| ours.as_str()).collect();
    assert_eq!(vae.names().collect::<BTreeSet<_>>(), ours);
    for (number, (ours, _)) in names.iter().enumerate() {
        let tensor = vae.tensor(ours, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(values(&tensor), [number as f32; 4]);
        assert_eq!(tensor.rank() == 2, ours.contains(".to_") && ours.ends_with("weight"), "{ours}");
    }
    Transformer::open(&path).unwrap();
    let (_, found) = parts(&path).unwrap();
    assert_eq!(found.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["transformer", "vae"]);
}

/// Above a gigabyte, and of shards, pages are sampled; the digest is then the same in both layouts.
#[test]
fn the_digest_tells_models_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let micro = tensors(&fixture("sd3_micro/diffusion_pytorch_model.safetensors"));
    write(&path, &micro);
    let digest = Transformer::open(&path).unwrap().weights.digest();
    assert_eq!(digest, blake3::hash(&std::fs::read(&path).unwrap()).to_hex().as_str());

    // The same tensors in two shards: another rule, and one changed element is seen at a tensor's start and end.
    let mut names: Vec<_> = micro.keys().cloned().collect();
    names.sort();
    let sharded = |micro: &Tensors, split: usize| {
        let mut map = serde_json::Map::new();
        for (shard, names) in [&names[..split], &names[split..]].into_iter().enumerate() {
            let file = format!("s{split}-{shard}.safetensors");
            let part = names.iter().map(|name| (name.clone(), micro[name].clone())).collect();
            write(&folder.path().join(&file), &part);
            map.extend(names.iter().map(|name| (name.clone(), file.clone().into())));
        }
        let index = folder.path().join(format!("s{split}.safetensors.index.json"));
        std::fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
        open_part(&index, "transformer").unwrap().digest()
    };
    let whole = sharded(&micro, 10);
    assert_eq!(whole, sharded(&micro, 60), "where shards are cut does not matter");
    assert_ne!(whole, digest);
    for end in [false, true] {
        let mut other = micro.clone();
        let mut changed = values(&micro["transformer_blocks.0.ff.net.2.weight"]);
        let place = if end { changed.len() - 1 } else { 0 };
        changed[place] += 1.0;
        let changed = Tensor::from_vec(changed, (24, 96), &Device::Cpu).unwrap();
        other.insert("transformer_blocks.0.ff.net.2.weight".into(), changed);
        assert_ne!(whole, sharded(&other, 10));
    }
}
