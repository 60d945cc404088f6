//! Rewards from their configuration.

use super::{
    Aesthetic, Alignment, Backbone, ClipReward, ColourMatch, Jpeg, Ocr, Remote, Reward, RewardConfig, RewardKind,
};
use crate::error::{Error, Result};
use candle_core::Device;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Model and tokenizer of a backbone.
type Files = (PathBuf, Option<PathBuf>);

/// Builds rewards; those that use the same model share it.
pub struct Loader {
    threads: usize,
    device: Device,
    backbones: RefCell<HashMap<Files, Arc<Backbone>>>,
}

impl Loader {
    /// For rewards that may use up to `threads` threads each, and `device` for their models.
    pub fn new(threads: usize, device: &Device) -> Self {
        Self { threads, device: device.clone(), backbones: RefCell::default() }
    }

    /// The rewards of a configuration, in its order.
    ///
    /// # Errors
    /// [`Error::Usage`] for a configuration that cannot be, or two rewards of one name; [`Error::File`] for a model that
    /// cannot be loaded.
    pub fn build(&self, configs: &[RewardConfig]) -> Result<Vec<Box<dyn Reward>>> {
        let mut rewards: Vec<Box<dyn Reward>> = Vec::with_capacity(configs.len());
        for config in configs {
            let usage = |message: String| Error::Usage(format!("reward {}: {message}", config.label()));
            config.check(u64::MAX).and_then(|()| config.check_files()).map_err(usage)?;
            if rewards.iter().any(|earlier| earlier.name() == config.label()) {
                return Err(usage("named twice; name it once, with one weight".into()));
            }
            rewards.push(self.one(config)?);
        }
        Ok(rewards)
    }

    fn one(&self, config: &RewardConfig) -> Result<Box<dyn Reward>> {
        let aligned = |alignment: Alignment| -> Result<Box<dyn Reward>> {
            Ok(Box::new(ClipReward { alignment, backbone: self.backbone(config)? }))
        };
        Ok(match config.name {
            RewardKind::Ocr => Box::new(match &config.detector {
                None => Ocr::new(self.threads)?,
                Some(detector) => Ocr::with_detector(self.threads, detector)?,
            }),
            RewardKind::Colour => Box::new(ColourMatch),
            RewardKind::JpegCompressibility => Box::new(Jpeg::Compressibility),
            RewardKind::JpegIncompressibility => Box::new(Jpeg::Incompressibility),
            RewardKind::ClipScore => aligned(Alignment::ClipScore)?,
            RewardKind::PickScore => aligned(Alignment::PickScore)?,
            RewardKind::Hps => aligned(Alignment::Hps)?,
            RewardKind::Aesthetic => {
                let predictor = config.predictor.clone().unwrap_or_default();
                Box::new(Aesthetic::load(&predictor, self.backbone(config)?)?)
            }
            RewardKind::Remote => Box::new(Remote::new(config)?),
        })
    }

    fn backbone(&self, config: &RewardConfig) -> Result<Arc<Backbone>> {
        let path = config.path.clone().unwrap_or_default();
        let key = (path.canonicalize().unwrap_or_else(|_| path.clone()), config.tokenizer.clone());
        if let Some(backbone) = self.backbones.borrow().get(&key) {
            return Ok(backbone.clone());
        }
        let backbone = Arc::new(Backbone::load(&path, config.tokenizer.as_deref(), &self.device)?);
        self.backbones.borrow_mut().insert(key, backbone.clone());
        Ok(backbone)
    }
}

/// The rewards of a configuration on the CPU, each with up to `threads` threads: [`Loader::build`].
///
/// # Errors
/// As there.
pub fn build(configs: &[RewardConfig], threads: usize) -> Result<Vec<Box<dyn Reward>>> {
    Loader::new(threads, &Device::Cpu).build(configs)
}
