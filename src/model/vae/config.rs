//! Sizes of the autoencoder, in the words of the checkpoint's config.json.

use crate::error::{Error, Result};
use crate::fs;
use crate::model::bounds::{LAYERS, LEVELS, WIDTH, within};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

/// Sizes of the autoencoder, and how its latents are scaled for the velocity model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Config {
    /// Channels of the blocks, from the picture's size down to the latent's: each but the last halves the picture.
    pub block_out_channels: Vec<usize>,
    /// Residual layers of an encoder block; a decoder block has one more.
    pub layers_per_block: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Groups of the group norms.
    pub norm_num_groups: usize,
    /// The velocity model's latent is (latent - shift_factor) * scaling_factor.
    pub scaling_factor: f64,
    /// See `scaling_factor`; models before Stable Diffusion 3 have none.
    #[serde(default, deserialize_with = "number_or_null")]
    pub shift_factor: f64,
    /// Whether a convolution of one pixel follows the encoder; in Stable Diffusion 3 none does.
    #[serde(default = "yes")]
    pub use_quant_conv: bool,
    /// Whether a convolution of one pixel precedes the decoder; in Stable Diffusion 3 none does.
    #[serde(default = "yes")]
    pub use_post_quant_conv: bool,
}

fn yes() -> bool {
    true
}

fn number_or_null<'de, D: serde::Deserializer<'de>>(value: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or(0.0))
}

impl Config {
    /// Stable Diffusion 3 and 3.5: 83,819,683 parameters.
    pub fn sd3() -> Self {
        Self {
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            latent_channels: 16,
            norm_num_groups: 32,
            scaling_factor: 1.5305,
            shift_factor: 0.0609,
            use_quant_conv: false,
            use_post_quant_conv: false,
        }
    }

    /// The config.json of a diffusers `AutoencoderKL`.
    ///
    /// # Errors
    /// The file cannot be read or describes another model: see [`Config::parse`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)?;
        Self::parse(&text).map_err(|message| Error::File { path: path.to_path_buf(), message })
    }

    /// The text of a diffusers `AutoencoderKL`'s config.json. `sample_size` says nothing about the weights, and
    /// `force_upcast` is about f16, in which nothing is computed here: both are ignored.
    ///
    /// # Errors
    /// What is wrong with it: it is of another model, or one of its settings is not supported.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let json: Value = serde_json::from_str(text).map_err(|e| format!("is not JSON: {e}"))?;
        let expect = |key: &str, wanted: Value, otherwise: Value| match json.get(key).unwrap_or(&otherwise) {
            value if *value == wanted => Ok(()),
            value => {
                Err(format!("has {key} = {value}, not {wanted}; give the vae/config.json of Stable Diffusion 3 or 3.5"))
            }
        };
        expect("_class_name", "AutoencoderKL".into(), Value::Null)?;
        let config: Self = serde_json::from_value(json.clone()).map_err(|e| format!("cannot be used: {e}"))?;
        let blocks = config.block_out_channels.len();
        let widest = config.block_out_channels.iter().copied().max().unwrap_or(0);
        within(&[
            ("levels in block_out_channels", blocks, LEVELS),
            ("channels in block_out_channels", widest, WIDTH),
            ("layers_per_block", config.layers_per_block, LAYERS),
            ("latent_channels", config.latent_channels, WIDTH),
            ("norm_num_groups", config.norm_num_groups, WIDTH),
        ])?;
        expect("down_block_types", vec!["DownEncoderBlock2D"; blocks].into(), Value::Null)?;
        expect("up_block_types", vec!["UpDecoderBlock2D"; blocks].into(), Value::Null)?;
        expect("act_fn", "silu".into(), "silu".into())?;
        expect("in_channels", 3.into(), 3.into())?;
        expect("out_channels", 3.into(), 3.into())?;
        expect("mid_block_add_attention", true.into(), true.into())?;
        expect("latents_mean", Value::Null, Value::Null)?;
        expect("latents_std", Value::Null, Value::Null)?;
        let groups = config.norm_num_groups;
        let whole = |&channels: &usize| channels > 0 && channels.is_multiple_of(groups);
        let scaled = config.scaling_factor.is_normal() && config.shift_factor.is_finite();
        if !config.block_out_channels.iter().all(whole) || !scaled {
            return Err(format!("has sizes that make no model: {config:?}"));
        }
        Ok(config)
    }

    /// Pixels of the picture along one pixel of the latent.
    pub fn scale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}
