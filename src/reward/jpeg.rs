//! How well a picture compresses as JPEG: the rewards of DDPO that need no model.

use super::{Loader, Reward, RewardSpec, check_count, failed, to_rgb8};
use crate::{data::Prompt, error::Result};
use candle_core::Tensor;
use image::RgbImage;
use jpeg_encoder::{ChromaSubsamplingMethod, ColorType, Encoder, SamplingFactor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Quality of the file, as in DDPO's program.
const QUALITY: u8 = 95;

/// `[[reward]]` with `name = "jpeg-compressibility"`, which has no keys of its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompressibilityConfig {}

impl RewardSpec for CompressibilityConfig {
    fn build(&self, _loader: &Loader) -> Result<Box<dyn Reward>> {
        Ok(Box::new(Jpeg::Compressibility))
    }
}

/// `[[reward]]` with `name = "jpeg-incompressibility"`, which has no keys of its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IncompressibilityConfig {}

impl RewardSpec for IncompressibilityConfig {
    fn build(&self, _loader: &Loader) -> Result<Box<dyn Reward>> {
        Ok(Box::new(Jpeg::Incompressibility))
    }
}

/// Size of the picture as a JPEG file, or its negative.
///
/// `incompressibility = bytes / 1000` and `compressibility = -bytes / 1000` of the file that Pillow writes with
/// `save(format="JPEG", quality=95)` (kvablack/ddpo-pytorch, ddpo_pytorch/rewards.py): baseline, 4:2:0, the tables of the
/// standard. Equal to the byte for sides that are multiples of 16, within 6 % for others.
/// Flow-GRPO divides the compressibility by 500 more: `weight = 0.002`.
pub enum Jpeg {
    /// Small files are good: `jpeg-compressibility`.
    Compressibility,
    /// Large files are good: `jpeg-incompressibility`.
    Incompressibility,
}

impl Reward for Jpeg {
    fn name(&self) -> &str {
        match self {
            Jpeg::Compressibility => "jpeg-compressibility",
            Jpeg::Incompressibility => "jpeg-incompressibility",
        }
    }

    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
        let pictures = to_rgb8(images)?;
        check_count(self.name(), pictures.len(), prompts)?;
        let sign = match self {
            Jpeg::Compressibility => -1.0,
            Jpeg::Incompressibility => 1.0,
        };
        let score =
            |picture: &RgbImage| Ok(Some(sign * jpeg(picture).map_err(failed(self.name()))?.len() as f64 / 1000.0));
        pictures.par_iter().map(score).collect()
    }
}

/// The picture as a JPEG file, as libjpeg writes it by default.
fn jpeg(picture: &RgbImage) -> std::result::Result<Vec<u8>, String> {
    let side = |pixels: u32| u16::try_from(pixels).map_err(|_| format!("{pixels} pixels a side are too many for JPEG"));
    let mut file = Vec::new();
    let mut encoder = Encoder::new(&mut file, QUALITY);
    encoder.set_sampling_factor(SamplingFactor::R_4_2_0);
    encoder.set_chroma_subsampling_method(ChromaSubsamplingMethod::Average);
    let (width, height) = (side(picture.width())?, side(picture.height())?);
    encoder.encode(picture, width, height, ColorType::Rgb).map_err(|error| error.to_string())?;
    Ok(file)
}
