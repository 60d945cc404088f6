//! The names that programs give to the factors of a LoRA, and ours: `MODULE.lora_A.weight`, `MODULE.lora_B.weight`.
//!
//! Sources: PEFT and diffusers write ours behind a prefix; kohya's sd-scripts (networks/lora_sd3.py) write
//! `lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight` with an `.alpha` for each module; ComfyUI reads both, and
//! dotted names behind `diffusion_model.`. Modules are called as diffusers or as the model's authors call them.

use super::Format;
use super::sai;
use super::weights::{Rows, Weights};
use crate::checks::is_positive_f32;
use crate::error::Result;
use std::collections::BTreeMap;

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Factor {
    /// `[rank, in]`.
    A,
    /// `[out, rank]`.
    B,
    /// A number: the update is alpha / rank times B A.
    Alpha,
}

/// Ends of the names.
const FACTORS: [(&str, Factor); 9] = [
    (".lora_A.weight", Factor::A),
    (".lora_B.weight", Factor::B),
    (".lora_A.default.weight", Factor::A),
    (".lora_B.default.weight", Factor::B),
    (".lora_down.weight", Factor::A),
    (".lora_up.weight", Factor::B),
    (".lora.down.weight", Factor::A),
    (".lora.up.weight", Factor::B),
    (".alpha", Factor::Alpha),
];

/// What stands before a module of the transformer, with dots in its name.
const DOTTED: [&str; 5] = [PEFT, "transformer.", "model.diffusion_model.", COMFY, "unet."];
const PEFT: &str = "base_model.model.";
const COMFY: &str = "diffusion_model.";

/// What stands before one with `_` in the place of its dots.
const JOINED: [&str; 2] = ["lora_unet_", "lora_transformer_"];

/// What stands before a module of a text encoder.
const OF_TEXT: [&str; 8] = [
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
    "text_encoders.",
    "lora_te",
    "base_model.model.text_model.",
    "clip_l.",
    "clip_g.",
];

/// Parts of the names of tensors that are of another method, and the method.
const OTHERS: [(&str, &str); 8] = [
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    (".hada_", "LoHa"),
    (".lokr_", "LoKr"),
    (".oft_", "OFT"),
    ("lora_mid", "a Tucker decomposition"),
    ("lora_B.bias", "a bias beside the factors"),
    ("modules_to_save", "whole modules beside the factors"),
];

/// An adapter's file by our names.
pub(super) struct Renamed {
    /// The factors.
    pub factors: Weights,
    /// Alpha of the modules for which the file has one.
    pub alphas: BTreeMap<String, f64>,
}

/// Whether this is the file of an adapter, readable or not.
pub(super) fn is_adapter(weights: &Weights) -> bool {
    let is_factor = |name: &str| FACTORS.iter().any(|(end, factor)| *factor != Factor::Alpha && name.ends_with(end));
    weights.names().any(|name| is_factor(name) || OTHERS.iter().any(|(part, _)| name.contains(part)))
}

/// The layout of an adapter's file by its names.
pub(super) fn format(weights: &Weights) -> Format {
    let begins = |prefixes: &[&str]| weights.names().any(|name| prefixes.iter().any(|p| name.starts_with(p)));
    match () {
        () if begins(&[PEFT]) => Format::PeftAdapter,
        () if begins(&JOINED) => Format::KohyaAdapter,
        () if begins(&[COMFY, "model.diffusion_model."]) => Format::ComfyAdapter,
        () => Format::DiffusersAdapter,
    }
}

/// Every tensor of an adapter's file by our names.
///
/// # Errors
/// A tensor is of a text encoder, of another method than LoRA, or of no layer of the transformer.
pub(super) fn renamed(weights: &Weights) -> Result<Renamed> {
    let text: Vec<&str> = weights.names().filter(|name| OF_TEXT.iter().any(|p| name.starts_with(p))).collect();
    if let Some(first) = text.first() {
        return Err(weights.error(format!(
            "has {} tensors of a text encoder's adapter ({first} first), and text encoders are not adapted here; save the \
             transformer's alone: pipeline.save_lora_weights(folder, transformer_lora_layers=...)",
            text.len()
        )));
    }
    let mut places = BTreeMap::new();
    let mut alphas = BTreeMap::new();
    for name in weights.names() {
        let (module, factor) = split(name).ok_or_else(|| weights.error(unknown(name)))?;
        let Some((ours, by_authors)) = layers(module) else {
            return Err(weights.error(format!(
                "holds {name}, of no layer of Stable Diffusion 3.5's transformer; is it of another model?"
            )));
        };
        if factor == Factor::Alpha {
            let alpha = weights.number(name)?;
            if !is_positive_f32(alpha) {
                return Err(weights.error(format!("holds {name} = {alpha}; an alpha must be above 0")));
            }
            alphas.extend(ours.into_iter().map(|module| (module, alpha)));
            continue;
        }
        let end = if factor == Factor::A { "lora_A" } else { "lora_B" };
        let rows = match factor {
            Factor::A => Rows::Shared,
            Factor::B if by_authors && is_swapped(weights, name, module, &ours) => Rows::HalvesSwapped,
            _ => Rows::Same,
        };
        let ours: Vec<String> = ours.into_iter().map(|module| format!("{module}.{end}.weight")).collect();
        places.insert(name.to_owned(), (ours, rows));
    }
    Ok(Renamed { factors: weights.renamed(|name| places.get(name).cloned())?, alphas })
}

/// Module and factor of a name.
fn split(name: &str) -> Option<(&str, Factor)> {
    FACTORS.iter().find_map(|(end, factor)| Some((name.strip_suffix(end)?, *factor)))
}

fn unknown(name: &str) -> String {
    let method = OTHERS.iter().find(|(part, _)| name.contains(part)).map(|(_, method)| method);
    let what = method.map_or("which is no factor of a LoRA".into(), |method| format!("of {method}"));
    format!("holds {name}, {what}; give a plain LoRA, or merge it into its model and give that as model.transformer")
}

/// Our layers for a module of the file, and whether it has its authors' name.
fn layers(module: &str) -> Option<(Vec<String>, bool)> {
    if let Some(joined) = JOINED.iter().find_map(|prefix| module.strip_prefix(prefix)) {
        return sai::layers(joined, "_");
    }
    let dotted = DOTTED.iter().find_map(|prefix| module.strip_prefix(prefix));
    sai::layers(dotted.unwrap_or(module), ".")
}

/// Whether the rows of B are shift, then scale there, and scale, then shift here: of the last norm, and of the text's in
/// the last block, which has two modulations of the model's width where the others have six.
fn is_swapped(weights: &Weights, b: &str, module: &str, ours: &[String]) -> bool {
    let a = weights.names().find(|name| split(name) == Some((module, Factor::A)));
    let dim = |name: &str, axis: usize| weights.shape(name).and_then(|shape| shape.get(axis).copied());
    let two = a.and_then(|a| dim(a, 1)).is_some_and(|width| dim(b, 0) == Some(2 * width));
    ours.iter().any(|layer| sai::is_swapped(layer, two))
}
