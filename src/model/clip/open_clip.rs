//! Weights of CLIP by the names of open_clip, whose models are the same but for names and how some tensors lie.

use super::config::{Activation, Config, TextConfig, VisionConfig};
use crate::error::{Error, Result};
use crate::fs;
use crate::model::files::AnyWeights;
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use std::path::Path;

/// transformers' beginnings of names and open_clip's, of what is alike otherwise.
const BEGINNINGS: [(&str, &str); 8] = [
    ("logit_scale", "logit_scale"),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
];
const POST_NORM: (&str, &str) = ("vision_model.post_layernorm.", "visual.ln_post.");
/// Both keep the matrix of a projection, the one as `[out, in]`, the other as `[in, out]`.
const PROJECTIONS: [(&str, &str); 2] =
    [("text_projection.weight", "text_projection"), ("visual_projection.weight", "visual.proj")];
/// The layers of a block.
const LAYERS: [(&str, &str); 5] = [
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
    ("self_attn.out_proj.", "attn.out_proj."),
];
/// These three lie below one another in `attn.in_proj_weight` and `attn.in_proj_bias`.
const FUSED: [&str; 3] = ["self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."];

/// Where a tensor is found.
#[derive(Debug, PartialEq)]
enum Place {
    /// As it is.
    Whole(String),
    /// Its columns are rows.
    Transposed(String),
    /// One of three equal parts of the rows.
    Third(String, usize),
}

impl Place {
    /// The place of what transformers calls `name`.
    fn of(name: &str) -> Option<Place> {
        let renamed = |table: &[(&str, &str)]| {
            table.iter().find_map(|(from, to)| Some(format!("{to}{}", name.strip_prefix(from)?)))
        };
        if let Some(projection) = renamed(&PROJECTIONS) {
            return Some(Place::Transposed(projection));
        }
        if let Some(whole) = renamed(&BEGINNINGS).or_else(|| renamed(&[POST_NORM])) {
            return Some(Place::Whole(whole));
        }
        let (tower, rest) = [("text_model", ""), ("vision_model", "visual.")]
            .iter()
            .find_map(|(from, to)| Some((to, name.strip_prefix(from)?.strip_prefix(".encoder.layers.")?)))?;
        let (index, layer) = rest.split_once('.')?;
        let block = format!("{tower}transformer.resblocks.{index}");
        if let Some((i, end)) = FUSED.iter().enumerate().find_map(|(i, from)| Some((i, layer.strip_prefix(from)?))) {
            return Some(Place::Third(format!("{block}.attn.in_proj_{end}"), i));
        }
        LAYERS.iter().find_map(|(from, to)| Some(Place::Whole(format!("{block}.{to}{}", layer.strip_prefix(from)?))))
    }
}

/// The tensor that transformers calls `name`, of the given shape.
///
/// # Errors
/// [`Error::File`]: it is missing or of another shape.
pub(super) fn tensor(
    weights: &AnyWeights,
    name: &str,
    shape: &[usize],
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let place = Place::of(name).ok_or_else(|| weights.error(format!("has no place for {name}")))?;
    let tensor = match &place {
        Place::Whole(at) => weights.tensor(at, dtype, device)?,
        Place::Transposed(at) => weights.tensor(at, dtype, device)?.t()?.contiguous()?,
        Place::Third(at, i) => {
            let all = weights.tensor(at, dtype, device)?;
            let rows = all.dim(0)? / 3;
            all.narrow(0, i * rows, rows)?.contiguous()?
        }
    };
    // open_clip's position tables and transformers' have one shape; a scalar may be [1].
    if tensor.dims() != shape && tensor.elem_count() != shape.iter().product::<usize>() {
        return Err(weights.error(format!("{place:?} has shape {:?}, not {shape:?}", tensor.dims())));
    }
    Ok(tensor.reshape(shape)?)
}

/// Whether these are open_clip's names.
pub(super) fn is_open_clip(weights: &AnyWeights) -> bool {
    weights.shape("visual.conv1.weight").is_some()
}

/// `open_clip_config.json`, as far as the shapes do not say it.
#[derive(Deserialize, Default)]
struct File {
    model_cfg: ModelSection,
}

#[derive(Deserialize, Default)]
struct ModelSection {
    #[serde(default)]
    quick_gelu: bool,
    vision_cfg: VisionSection,
    text_cfg: TextSection,
}

#[derive(Deserialize, Default)]
struct VisionSection {
    head_width: Option<usize>,
}

#[derive(Deserialize, Default)]
struct TextSection {
    heads: Option<usize>,
}

/// The sizes, of the shapes, and of `open_clip_config.json` in `folder` where it is there. Without it the heads are those
/// of open_clip's ViT models of that width, and the activation is GELU.
///
/// # Errors
/// [`Error::File`]: something is missing, or the file cannot be read.
pub(super) fn config(weights: &AnyWeights, folder: &Path) -> Result<Config> {
    let path = folder.join("open_clip_config.json");
    let file: File = match path.exists().then(|| fs::read_to_string(&path)).transpose()? {
        None => File::default(),
        Some(text) => serde_json::from_str(&text)
            .map_err(|e| Error::File { path, message: format!("is no configuration of open_clip: {e}") })?,
    };
    let shape = |name: &str| weights.shape(name).ok_or_else(|| weights.error(format!("lacks {name}")));
    let blocks = |tower: &str| {
        (0..).take_while(|i| weights.shape(&format!("{tower}transformer.resblocks.{i}.ln_1.weight")).is_some()).count()
    };
    let hidden = |tower: &str| Ok::<_, Error>(shape(&format!("{tower}transformer.resblocks.0.mlp.c_fc.weight"))?[0]);
    let [width, channels, patch, _] = shape("visual.conv1.weight")?[..] else {
        return Err(weights.error("visual.conv1.weight is no convolution; is it a vision transformer?"));
    };
    let places = shape("visual.positional_embedding")?[0].saturating_sub(1);
    let head = file.model_cfg.vision_cfg.head_width.unwrap_or(match width {
        1280 => 80,
        1408 => 88,
        1664 => 104,
        _ => 64,
    });
    let activation = if file.model_cfg.quick_gelu { Activation::QuickGelu } else { Activation::Gelu };
    let [vocabulary, text_width] = shape("token_embedding.weight")?[..] else {
        return Err(weights.error("token_embedding.weight is no table"));
    };
    Ok(Config {
        projection_dim: *shape("text_projection")?.last().unwrap_or(&0),
        text_config: TextConfig {
            vocab_size: vocabulary,
            hidden_size: text_width,
            intermediate_size: hidden("")?,
            num_hidden_layers: blocks(""),
            num_attention_heads: file.model_cfg.text_cfg.heads.unwrap_or((text_width / 64).max(1)),
            max_position_embeddings: shape("positional_embedding")?[0],
            hidden_act: activation,
            eos_token_id: 2, // the largest token, as open_clip has it
            ..TextConfig::default()
        },
        vision_config: VisionConfig {
            hidden_size: width,
            intermediate_size: hidden("visual.")?,
            num_hidden_layers: blocks("visual."),
            num_attention_heads: (width / head).max(1),
            num_channels: channels,
            image_size: places.isqrt() * patch,
            patch_size: patch,
            hidden_act: activation,
            ..VisionConfig::default()
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_transformers_find_their_place() {
        let whole = |name: &str| Some(Place::Whole(name.to_string()));
        assert_eq!(Place::of("logit_scale"), whole("logit_scale"));
        assert_eq!(Place::of("text_model.embeddings.position_embedding.weight"), whole("positional_embedding"));
        assert_eq!(Place::of("text_model.final_layer_norm.bias"), whole("ln_final.bias"));
        assert_eq!(Place::of("vision_model.pre_layrnorm.weight"), whole("visual.ln_pre.weight"));
        assert_eq!(Place::of("vision_model.post_layernorm.weight"), whole("visual.ln_post.weight"));
        assert_eq!(
            Place::of("vision_model.encoder.layers.31.mlp.fc2.bias"),
            whole("visual.transformer.resblocks.31.mlp.c_proj.bias")
        );
        assert_eq!(
            Place::of("text_model.encoder.layers.3.self_attn.v_proj.weight"),
            Some(Place::Third("transformer.resblocks.3.attn.in_proj_weight".into(), 2))
        );
        assert_eq!(Place::of("visual_projection.weight"), Some(Place::Transposed("visual.proj".into())));
        assert_eq!(Place::of("vision_model.encoder.layers.0.attn.weight"), None);
        assert_eq!(Place::of("lora.weight"), None);
    }
}
