//! Names of the model's authors (`sd3.5_medium.safetensors`, `sd3.5_large.safetensors`), and the names of diffusers, which are ours.
//!
//! The source of the tables is diffusers: scripts/convert_sd3_to_diffusers.py at 3ab805a for the transformer,
//! `convert_ldm_vae_checkpoint` (loaders/single_file_utils.py of v0.33.1) for the VAE.

use super::weights::{Rows, Weights};
use crate::error::Result;

/// Where the transformer's tensors begin in a file that holds more, and as ComfyUI's programs save it alone.
const TRANSFORMER_PREFIXES: [&str; 2] = ["model.diffusion_model.", "diffusion_model."];

/// Where the VAE's tensors begin.
const VAE_PREFIX: &str = "first_stage_model.";

/// Outside the blocks: theirs, ours, without `.weight` and `.bias`.
const OUTER: [(&str, &str); 9] = [
    ("pos_embed", "pos_embed.pos_embed"),
    ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("context_embedder", "context_embedder"),
    (LAST_MODULATION, "norm_out.linear"),
    ("final_layer.linear", "proj_out"),
];

/// In a block. Three of ours are queries, keys and values, which lie one upon another in theirs.
const BLOCK: [(&str, &[&str]); 18] = [
    ("x_block.adaLN_modulation.1", &["norm1.linear"]),
    ("x_block.attn.qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
    ("x_block.attn.ln_q", &["attn.norm_q"]),
    ("x_block.attn.ln_k", &["attn.norm_k"]),
    ("x_block.attn.proj", &["attn.to_out.0"]),
    ("x_block.attn2.qkv", &["attn2.to_q", "attn2.to_k", "attn2.to_v"]),
    ("x_block.attn2.ln_q", &["attn2.norm_q"]),
    ("x_block.attn2.ln_k", &["attn2.norm_k"]),
    ("x_block.attn2.proj", &["attn2.to_out.0"]),
    ("x_block.mlp.fc1", &["ff.net.0.proj"]),
    ("x_block.mlp.fc2", &["ff.net.2"]),
    (TEXT_MODULATION, &["norm1_context.linear"]),
    ("context_block.attn.qkv", &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    ("context_block.attn.ln_q", &["attn.norm_added_q"]),
    ("context_block.attn.ln_k", &["attn.norm_added_k"]),
    ("context_block.attn.proj", &["attn.to_add_out"]),
    ("context_block.mlp.fc1", &["ff_context.net.0.proj"]),
    ("context_block.mlp.fc2", &["ff_context.net.2"]),
];

/// These two give shift, then scale in theirs, and scale, then shift in ours; the second only in the last block.
const LAST_MODULATION: &str = "final_layer.adaLN_modulation.1";
const TEXT_MODULATION: &str = "context_block.adaLN_modulation.1";

/// Pieces of the VAE's names: theirs, ours.
const VAE: [(&str, &str); 17] = [
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".norm_out.", ".conv_norm_out."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".downsample.conv.", ".downsamplers.0.conv."),
    (".upsample.conv.", ".upsamplers.0.conv."),
    (".block.", ".resnets."),
    ("encoder.down.", "encoder.down_blocks."),
    // Theirs are numbered by resolution, ours in the order in which they run.
    ("decoder.up.0.", "decoder.up_blocks.3."),
    ("decoder.up.1.", "decoder.up_blocks.2."),
    ("decoder.up.2.", "decoder.up_blocks.1."),
    ("decoder.up.3.", "decoder.up_blocks.0."),
];

/// The transformer of a file by its authors' names, by ours; none if the file has none. A tensor that the tables do not
/// know keeps its name.
///
/// # Errors
/// A fused tensor cannot be divided.
pub(super) fn transformer(weights: &Weights) -> Result<Option<Weights>> {
    let mut inside = TRANSFORMER_PREFIXES.into_iter().map(|prefix| weights.under(prefix));
    let inside = inside.find(|inside| inside.names().next().is_some());
    let weights = inside.as_ref().unwrap_or(weights);
    if !weights.contains("x_embedder.proj.weight") {
        return Ok(None);
    }
    let depth = weights.names().filter_map(block).map(|(index, _)| index + 1).max().unwrap_or(0);
    weights.renamed(|name| Some(transformer_names(name, depth))).map(Some)
}

/// Our layers for the layer `name` of an adapter, by its authors' names or ours, whose words stand between `dots`: three
/// where theirs is one of queries, keys and values; and whether the name is theirs. None for a layer of another model.
pub(super) fn layers(name: &str, dots: &str) -> Option<(Vec<String>, bool)> {
    let spelled = |layer: &str| layer.replace('.', dots);
    if let Some((theirs, ours)) =
        OUTER.iter().find(|(theirs, ours)| [spelled(theirs), spelled(ours)].contains(&name.into()))
    {
        return Some((vec![(*ours).to_owned()], spelled(theirs) == name && theirs != ours));
    }
    let by_authors = name.starts_with("joint_blocks");
    let blocks = if by_authors { "joint_blocks" } else { "transformer_blocks" };
    let (index, part) = name.strip_prefix(blocks)?.strip_prefix(dots)?.split_once(dots)?;
    let index: usize = index.parse().ok()?;
    let ours: Vec<&str> = match by_authors {
        true => BLOCK.iter().find(|(theirs, _)| spelled(theirs) == part)?.1.to_vec(),
        false => vec![BLOCK.iter().flat_map(|(_, ours)| *ours).find(|ours| spelled(ours) == part)?],
    };
    Some((ours.iter().map(|ours| format!("transformer_blocks.{index}.{ours}")).collect(), by_authors))
}

/// Whether one of our layers has its rows' halves swapped against the authors'; `two`: it gives two modulations.
pub(super) fn is_swapped(layer: &str, two: bool) -> bool {
    layer == "norm_out.linear" || two && layer.ends_with(".norm1_context.linear")
}

/// Number and rest of a name in a block.
fn block(name: &str) -> Option<(usize, &str)> {
    let (index, rest) = name.strip_prefix("joint_blocks.")?.split_once('.')?;
    Some((index.parse().ok()?, rest))
}

/// Our names for one of theirs in a model of `depth` blocks.
fn transformer_names(name: &str, depth: usize) -> (Vec<String>, Rows) {
    let end = [".weight", ".bias"].into_iter().find(|end| name.ends_with(end)).unwrap_or_default();
    let stem = &name[..name.len() - end.len()];
    let of_block = block(stem).and_then(|(index, part)| {
        let (_, ours) = BLOCK.iter().find(|(theirs, _)| *theirs == part)?;
        let names = ours.iter().map(|ours| format!("transformer_blocks.{index}.{ours}{end}")).collect();
        Some((names, part == TEXT_MODULATION && index + 1 == depth))
    });
    let outer = || {
        let (_, ours) = OUTER.iter().find(|(theirs, _)| *theirs == stem)?;
        Some((vec![format!("{ours}{end}")], stem == LAST_MODULATION))
    };
    match of_block.or_else(outer) {
        None => (vec![name.to_owned()], Rows::Same),
        Some((names, false)) => (names, Rows::Same),
        Some((names, true)) => (names, Rows::HalvesSwapped),
    }
}

/// The VAE of a file by its authors' names, by ours; none if the file has none.
///
/// # Errors
/// None: only its 1 x 1 convolutions change their shape.
pub(super) fn vae(weights: &Weights) -> Result<Option<Weights>> {
    let inside = weights.under(VAE_PREFIX);
    let weights = if inside.names().next().is_some() { &inside } else { weights };
    if !weights.contains("decoder.mid.block_1.norm1.weight") {
        return Ok(None);
    }
    weights.renamed(|name| Some(vae_name(name))).map(Some)
}

/// Our name for one of theirs.
fn vae_name(name: &str) -> (Vec<String>, Rows) {
    let ours = VAE.iter().fold(name.to_owned(), |name, (theirs, ours)| name.replace(theirs, ours));
    // The attention's projections are convolutions there, matrices here.
    let rows = if name.contains(".attn_1.") { Rows::Matrix } else { Rows::Same };
    (vec![ours], rows)
}
