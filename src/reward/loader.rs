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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewards_of_one_model_share_it() -> Result<()> {
        let fixtures = std::env::var_os("FLOWRL_FIXTURES")
            .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
        let config = |name: RewardKind, model: &str| RewardConfig {
            path: Some(fixtures.join(model)),
            tokenizer: Some(fixtures.join("clip_rewards/hf")),
            predictor: (name == RewardKind::Aesthetic).then(|| fixtures.join("clip_rewards/predictor.pth")),
            ..RewardConfig::new(name)
        };
        let loader = Loader::new(1, &Device::Cpu);
        let configs = [
            config(RewardKind::ClipScore, "pickscore_micro"),
            config(RewardKind::Aesthetic, "pickscore_micro"),
            config(RewardKind::PickScore, "clip_rewards/../pickscore_micro"), // the same folder by another way
        ];
        let trained = loader.build(&configs)?;
        let evaluated = loader.build(&configs[1..])?;
        assert_eq!((loader.backbones.borrow().len(), trained.len() + evaluated.len()), (1, 5));
        let (one, two) = (loader.backbone(&configs[0])?, loader.backbone(&configs[2])?);
        assert!(Arc::ptr_eq(&one, &two));
        assert_eq!(Arc::strong_count(&one), 5 + 2 + 1, "every reward holds the one that the loader has");
        loader.build(&[config(RewardKind::Hps, "clip_rewards/open_clip/model.pt")])?;
        assert_eq!(loader.backbones.borrow().len(), 2, "another model is another one");
        Ok(())
    }
}
