//! Sizes of the model, in the words of the checkpoint's config.json.

use crate::error::{Error, Result};
use crate::fs;
use crate::model::bounds::{LAYERS, POSITIONS, WIDTH, within};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// What queries and keys are normalised by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// A root-mean-square norm of each head, with weights.
    RmsNorm,
}

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
    /// What queries and keys are normalised by; nothing: they are not, as in Stable Diffusion 3.
    #[serde(default)]
    pub qk_norm: Option<QkNorm>,
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
            qk_norm: Some(QkNorm::RmsNorm),
        }
    }

    /// Stable Diffusion 3 Medium: 2,028,328,000 parameters; no second attention, and no norm of queries and keys.
    pub fn sd3_medium() -> Self {
        Self { pos_embed_max_size: 192, dual_attention_layers: Vec::new(), qk_norm: None, ..Self::sd35_medium() }
    }

    /// Stable Diffusion 3.5 Large: 8,056,627,520 parameters; no block has a second attention.
    pub fn sd35_large() -> Self {
        Self {
            num_layers: 38,
            num_attention_heads: 38,
            caption_projection_dim: 2432,
            pos_embed_max_size: 192,
            dual_attention_layers: Vec::new(),
            ..Self::sd35_medium()
        }
    }

    /// The config.json of a diffusers transformer.
    ///
    /// # Errors
    /// The file cannot be read or describes another model: see [`Config::parse`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)?;
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
                "has {key} = {value}, not {}; give the transformer/config.json of Stable Diffusion 3 or 3.5",
                wanted[0]
            )),
        };
        expect("_class_name", &["SD3Transformer2DModel".into()])?;
        expect("qk_norm", &["rms_norm".into(), Value::Null])?;
        let config: Self = serde_json::from_value(json.clone()).map_err(|e| format!("cannot be used: {e}"))?;
        within(&[
            ("patch_size", config.patch_size, WIDTH),
            ("in_channels", config.in_channels, WIDTH),
            ("num_layers", config.num_layers, LAYERS),
            ("attention_head_dim", config.attention_head_dim, WIDTH),
            ("num_attention_heads", config.num_attention_heads, WIDTH / config.attention_head_dim.clamp(1, WIDTH)),
            ("joint_attention_dim", config.joint_attention_dim, WIDTH),
            ("pooled_projection_dim", config.pooled_projection_dim, WIDTH),
            ("sample_size", config.sample_size, WIDTH),
            ("pos_embed_max_size", config.pos_embed_max_size, POSITIONS),
        ])?;
        // The velocity has the latent's channels; the text tokens are concatenated with the image's.
        expect("out_channels", &[config.in_channels.into(), Value::Null])?;
        expect("caption_projection_dim", &[config.width().into()])?;
        let blocks = &config.dual_attention_layers;
        if let Some(block) = blocks.iter().find(|&&block| block >= config.num_layers) {
            return Err(format!("has block {block} in dual_attention_layers, but num_layers = {}", config.num_layers));
        }
        if config.base_size() == 0 || !config.width().is_multiple_of(4) {
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

    /// Floating-point operations of a forward pass for one sample: a latent of `latent` = (height, width) and `text` text
    /// tokens. Matrix products only, a multiplication and an addition counted as two; without adapters.
    pub fn flops(&self, latent: (usize, usize), text: usize) -> f64 {
        let image = self.image_tokens(latent);
        let (image, text, width, layers) = (image as f64, text as f64, self.width() as f64, self.num_layers as f64);
        let dual = self.dual_attention_layers.len() as f64;
        let square = 2.0 * width * width; // a token through a matrix of the model's width
        let token = 4.0 + 8.0; // query, key, value, out; and a hidden layer four times as wide
        let attention = 4.0 * width * (image + text).powi(2) * layers + 4.0 * width * image.powi(2) * dual;
        let blocks = (layers * token + dual * 4.0) * image + (layers * token - 9.0) * text; // the last one drops the text
        let modulations = layers * 12.0 + dual * 3.0 - 4.0;
        let patches = 2.0 * 2.0 * self.patch_dim() as f64 * width * image; // in and out
        let embedding = 2.0 * width * self.joint_attention_dim as f64 * text;
        let vector = 2.0 * width * (256.0 + self.pooled_projection_dim as f64) + (2.0 + 2.0) * square;
        attention + square * (blocks + modulations) + patches + embedding + vector
    }

    /// Patches of a latent picture of this height and width.
    pub fn image_tokens(&self, latent: (usize, usize)) -> usize {
        (latent.0 / self.patch_size) * (latent.1 / self.patch_size)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_no_model_has_are_refused_before_anything_is_made_of_them() {
        let refused = |key: &str, value: Value| {
            let mut json = Config::sd35_medium().to_json();
            json[key] = value;
            let message = Config::parse(&json.to_string()).unwrap_err();
            assert!(message.contains(key), "{key}: {message}");
        };
        for key in ["num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "patch_size"] {
            refused(key, 0.into());
            refused(key, (1_u64 << 40).into());
        }
        refused("pos_embed_max_size", 100_000.into());
        refused("dual_attention_layers", json!([0, 24]));
        refused("num_layers", u64::MAX.into());
    }

    /// torch's own counter on diffusers' models at 512 px with 205 text tokens, in GFLOP.
    #[test]
    fn flops_are_those_that_torch_counts() {
        for (config, counted) in
            [(Config::sd35_medium(), 2224.0), (Config::sd35_large(), 7176.05), (Config::sd3_medium(), 1888.52)]
        {
            let flops = config.flops((64, 64), 205) / 1e9;
            assert!((flops / counted - 1.0).abs() < 0.01, "{flops} GFLOP");
        }
    }
}
