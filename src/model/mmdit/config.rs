//! Sizes of the model, in the words of the checkpoint's config.json.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// Sizes of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Side of a patch, in latent pixels.
    pub patch_size: usize,
    /// Channels of a latent.
    pub in_channels: usize,
    /// Joint blocks.
    pub num_layers: usize,
    /// Features of a head.
    pub attention_head_dim: usize,
    /// Attention heads; times the features of a head: the model's width D.
    pub num_attention_heads: usize,
    /// Features of a text token.
    pub joint_attention_dim: usize,
    /// Features of a text token in the model: D.
    pub caption_projection_dim: usize,
    /// Features of the pooled text.
    pub pooled_projection_dim: usize,
    /// Side of the latent whose patches are one unit of position apart.
    pub sample_size: usize,
    /// Side of the table of positions, in patches: the largest latent.
    pub pos_embed_max_size: usize,
    /// The blocks whose image stream has a second attention, on itself alone.
    #[serde(default)]
    pub dual_attention_layers: Vec<usize>,
}

impl Config {
    /// Stable Diffusion 3.5 Medium: 2,243,171,520 parameters.
    pub fn sd35_medium() -> Self {
        Self {
            patch_size: 2,
            in_channels: 16,
            num_layers: 24,
            attention_head_dim: 64,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            caption_projection_dim: 1536,
            pooled_projection_dim: 2048,
            sample_size: 128,
            pos_embed_max_size: 384,
            dual_attention_layers: (0..13).collect(),
        }
    }

    /// The config.json of a diffusers transformer.
    ///
    /// # Errors
    /// The file cannot be read or describes another model: see [`Config::parse`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        Self::parse(&text).map_err(|message| Error::File { path: path.to_path_buf(), message })
    }

    /// The text of a diffusers transformer's config.json.
    ///
    /// # Errors
    /// What is wrong with it: it is of another model, or one of its settings is not supported.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let json: Value = serde_json::from_str(text).map_err(|e| format!("is not JSON: {e}"))?;
        let expect = |key: &str, wanted: &[Value]| match json.get(key).unwrap_or(&Value::Null) {
            value if wanted.contains(value) => Ok(()),
            value => Err(format!(
                "has {key} = {value}, not {}; give the transformer/config.json of Stable Diffusion 3.5 Medium",
                wanted[0]
            )),
        };
        expect("_class_name", &["SD3Transformer2DModel".into()])?;
        expect("qk_norm", &["rms_norm".into()])?;
        let config: Self = serde_json::from_value(json.clone()).map_err(|e| format!("cannot be used: {e}"))?;
        // The velocity has the latent's channels; the text tokens are concatenated with the image's.
        expect("out_channels", &[config.in_channels.into(), Value::Null])?;
        expect("caption_projection_dim", &[config.width().into()])?;
        let sizes = [config.patch_size, config.in_channels, config.num_layers, config.width(), config.base_size()];
        if sizes.contains(&0) || !config.width().is_multiple_of(4) {
            return Err(format!("has sizes that make no model: {config:?}"));
        }
        Ok(config)
    }

    /// The config.json of a diffusers transformer: what [`Config::parse`] reads.
    pub fn to_json(&self) -> Value {
        let mut json = json!({
            "_class_name": "SD3Transformer2DModel",
            "_diffusers_version": "0.33.1",
            "out_channels": self.in_channels,
            "qk_norm": "rms_norm",
        });
        if let (Some(object), Ok(Value::Object(sizes))) = (json.as_object_mut(), serde_json::to_value(self)) {
            object.extend(sizes);
        }
        json
    }

    /// The model's width D.
    pub fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Values of a patch.
    pub(super) fn patch_dim(&self) -> usize {
        self.in_channels * self.patch_size * self.patch_size
    }

    /// Side of the grid that has positions 0, 1, 2, ..., in patches.
    pub(super) fn base_size(&self) -> usize {
        self.sample_size / self.patch_size.max(1)
    }
}
