//! CLIP (Radford et al., arXiv 2103.00020) as transformers has it (models/clip/modeling_clip.py of v4.57): the tower of
//! texts, the tower of pictures, and both as one model. Frozen: read from the folders that transformers writes, with
//! its names.

mod block;
mod config;
mod open_clip;
mod text;
mod vision;

pub use config::{Activation, Config, TextConfig, VisionConfig};
pub use text::{TextEncoder, TextOutput};

use super::files::{AnyWeights, Weights};
use super::frozen::load;
use crate::error::Result;
use crate::params::{Init, ParamSet, Spec, SpecList, StageParams};
use candle_core::{DType, Device, Tensor};
use std::path::Path;
use text::TextTower;
use vision::VisionTower;

/// Both towers, into one space of features.
#[derive(Debug)]
pub struct Clip {
    config: Config,
    text: TextTower,
    vision: VisionTower,
    logit_scale: f64,
    params: StageParams,
}

impl Clip {
    /// Reads a `CLIPModel` from `folder`: config.json and the weights, computed in `dtype`, f32 or bf16.
    ///
    /// # Errors
    /// [`crate::Error::File`]: something is missing, of another model, or not supported.
    pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let weights = Weights::open(folder)?;
        let logit_scale = weights.tensor(LOGIT_SCALE, DType::F32, &Device::Cpu)?;
        Self::assemble(Config::read(folder)?, &logit_scale, |specs| load(&weights, specs, is_buffer, dtype, device))
    }

    /// Reads a CLIP model from wherever it lies: a folder of transformers', or open_clip's tensors in a folder, a
    /// safetensors file or one of `torch.save`; computed in `dtype`, f32 or bf16.
    ///
    /// # Errors
    /// [`crate::Error::File`]: something is missing, of another model, or not supported.
    pub fn open(path: &Path, dtype: DType, device: &Device) -> Result<Self> {
        if path.join("config.json").is_file() {
            return Self::load(path, dtype, device);
        }
        let weights = AnyWeights::open(path)?;
        if !open_clip::is_open_clip(&weights) {
            return Err(weights.error(
                "holds no CLIP model; give a folder of transformers' with config.json, or weights of open_clip",
            ));
        }
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        let config = open_clip::config(&weights, folder)?;
        let logit_scale = open_clip::tensor(&weights, LOGIT_SCALE, &[], DType::F32, &Device::Cpu)?;
        Self::assemble(config, &logit_scale, |specs| {
            let set =
                ParamSet::build(&[specs], |spec| open_clip::tensor(&weights, &spec.name, &spec.shape, dtype, device))?;
            Ok(set.stage(0).clone())
        })
    }

    fn assemble(
        config: Config,
        logit_scale: &Tensor,
        params: impl FnOnce(&[Spec]) -> Result<StageParams>,
    ) -> Result<Self> {
        let mut specs = SpecList::new("", None);
        let text = TextTower::new(&mut specs, &config.text_config, config.projection_dim);
        let vision = VisionTower::new(&mut specs, &config.vision_config, config.projection_dim);
        specs.base(LOGIT_SCALE, &[], Init::Ones);
        let params = params(&specs.finish())?;
        // Its exponential multiplies every logit: bf16 would be 1 % off.
        let logit_scale = f64::from(logit_scale.to_scalar::<f32>()?);
        Ok(Self { config, text, vision, logit_scale, params })
    }

    /// The sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Features of texts `[B, projection_dim]`, not normalised. `ids` have one length; what pads them stands behind the
    /// end token and changes nothing.
    pub fn text_features(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        Ok(self.text.forward(&self.params, ids)?.features)
    }

    /// Features of pictures `[B, C, image_size, image_size]`, resized and normalised as the model wants them:
    /// `[B, projection_dim]`, not normalised.
    pub fn image_features(&self, pixels: &Tensor) -> Result<Tensor> {
        self.vision.forward(&self.params, pixels)
    }

    /// The logarithm of what multiplies the cosine of two features.
    pub fn logit_scale(&self) -> f64 {
        self.logit_scale
    }
}

const LOGIT_SCALE: &str = "logit_scale";

/// Tables that older files hold and nobody needs: 0, 1, 2, ...
fn is_buffer(name: &str) -> bool {
    name.ends_with("embeddings.position_ids")
}
