//! Sizes of the towers, in the words of transformers' config.json. It leaves out what has its default value, so the
//! defaults here are those of transformers' `CLIPTextConfig`, `CLIPVisionConfig` and `CLIPConfig`.

use crate::error::{Error, Result};
use crate::model::bounds::{LAYERS, VOCABULARY, WIDTH, positive, within};
use crate::model::frozen::read_config;
use crate::ops;
use candle_core::Tensor;
use serde::Deserialize;
use std::path::Path;

/// What stands between the two layers of a block's MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// x sigmoid(1.702 x).
    QuickGelu,
    /// x Phi(x), with the error function.
    Gelu,
}

impl Activation {
    /// Of any shape.
    pub(super) fn forward(self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Activation::QuickGelu => ops::silu(&(x * 1.702)?)? / 1.702,
            Activation::Gelu => x.gelu_erf(),
        }
    }
}

/// The tower of texts.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    /// Tokens.
    pub vocab_size: usize,
    /// Width D.
    pub hidden_size: usize,
    /// Width of the blocks' MLPs.
    pub intermediate_size: usize,
    /// Features, for a tower that stands alone.
    pub projection_dim: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Longest text in tokens.
    pub max_position_embeddings: usize,
    /// Activation of the MLPs.
    pub hidden_act: Activation,
    /// Inside every norm's square root.
    pub layer_norm_eps: f64,
    /// The end token. 2, which is none, means the largest token of a text.
    pub eos_token_id: u32,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
        }
    }
}

impl TextConfig {
    /// The config.json of a `CLIPTextModelWithProjection` in `folder`.
    ///
    /// # Errors
    /// [`Error::File`]: it cannot be read, is of another model or not supported.
    pub fn read(folder: &Path) -> Result<Self> {
        let config: Self = read_config(folder, &["clip_text_model"])?;
        config.check(folder)?;
        Ok(config)
    }

    fn check(&self, folder: &Path) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size, VOCABULARY),
            ("intermediate_size", self.intermediate_size, WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, LAYERS),
            ("max_position_embeddings", self.max_position_embeddings, WIDTH),
        ];
        check_sizes(folder, &sizes, (self.hidden_size, self.num_attention_heads), self.layer_norm_eps)
    }

    /// The place of the token whose state stands for the whole text, transformers' rule: the first end token, else 0;
    /// where the configuration says 2, as all old ones do, the first largest token, which the end token is.
    pub(super) fn end(&self, ids: &[u32]) -> usize {
        let end = match self.eos_token_id {
            2 => ids.iter().max().copied(),
            id => Some(id),
        };
        ids.iter().position(|&id| Some(id) == end).unwrap_or(0)
    }
}

/// The tower of pictures.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Width D.
    pub hidden_size: usize,
    /// Width of the blocks' MLPs.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Channels of a picture.
    pub num_channels: usize,
    /// Side of a picture in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Activation of the MLPs.
    pub hidden_act: Activation,
    /// Inside every norm's square root.
    pub layer_norm_eps: f64,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

impl VisionConfig {
    /// Patches of a picture.
    pub(super) fn patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }
}

/// Both towers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The tower of texts.
    pub text_config: TextConfig,
    /// The tower of pictures.
    pub vision_config: VisionConfig,
    /// Features of either.
    pub projection_dim: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { text_config: TextConfig::default(), vision_config: VisionConfig::default(), projection_dim: 512 }
    }
}

impl Config {
    /// The config.json of a `CLIPModel` in `folder`.
    ///
    /// # Errors
    /// [`Error::File`]: it cannot be read, is of another model or not supported.
    pub fn read(folder: &Path) -> Result<Self> {
        let config: Self = read_config(folder, &["clip"])?;
        config.text_config.check(folder)?;
        let vision = &config.vision_config;
        let sizes = [
            ("intermediate_size", vision.intermediate_size, WIDTH),
            ("num_hidden_layers", vision.num_hidden_layers, LAYERS),
            ("num_channels", vision.num_channels, WIDTH),
            ("image_size", vision.image_size, WIDTH),
            ("patch_size", vision.patch_size, vision.image_size),
            ("projection_dim", config.projection_dim, WIDTH),
        ];
        check_sizes(folder, &sizes, (vision.hidden_size, vision.num_attention_heads), vision.layer_norm_eps)?;
        Ok(config)
    }
}

fn check_sizes(folder: &Path, sizes: &[(&str, usize, usize)], (width, heads): (usize, usize), eps: f64) -> Result<()> {
    let error = |message| Error::File { path: folder.join("config.json"), message };
    within(sizes).and_then(|()| positive("layer_norm_eps", eps)).map_err(error)?;
    within(&[("hidden_size", width, WIDTH), ("num_attention_heads", heads, width)]).map_err(error)?;
    if !width.is_multiple_of(heads) {
        return Err(error(format!("has hidden_size = {width}, which {heads} heads cannot share")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// transformers, models/clip/modeling_clip.py of v4.57: argmax of the ids for 2, else of (ids == eos_token_id).
    #[test]
    fn the_end_of_a_text_is_where_transformers_sees_it() {
        let end = |eos_token_id, ids: &[u32]| TextConfig { eos_token_id, ..TextConfig::default() }.end(ids);
        let ids = [498, 5, 499, 499, 0, 3];
        assert_eq!(end(2, &ids), 2);
        assert_eq!(end(2, &[2, 1, 9, 9]), 2);
        assert_eq!(end(0, &ids), 4);
        assert_eq!(end(7, &ids), 0);
    }

    #[test]
    fn what_a_configuration_leaves_out_has_the_value_of_transformers() {
        let text: TextConfig = serde_json::from_str(r#"{"hidden_act": "gelu", "pad_token_id": 1}"#).unwrap();
        assert_eq!(text, TextConfig { hidden_act: Activation::Gelu, ..TextConfig::default() });
        assert_eq!((text.hidden_size, text.num_attention_heads, text.vocab_size), (512, 8, 49408));
        let config: Config = serde_json::from_str(r#"{"vision_config": {"patch_size": 14}}"#).unwrap();
        assert_eq!((config.vision_config.patches(), config.projection_dim), (256, 512));
    }
}
