//! Rewards from their configuration.

use super::{Backbone, ClipFiles, Reward, RewardConfig};
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
            config.check(u64::MAX).and_then(|()| config.settings.check_files()).map_err(usage)?;
            if rewards.iter().any(|earlier| earlier.name() == config.label()) {
                return Err(usage("named twice; name it once, with one weight".into()));
            }
            rewards.push(config.settings.build(self)?);
        }
        Ok(rewards)
    }

    /// Threads that a reward may use.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The model of the CLIP family in these files, which rewards share.
    ///
    /// # Errors
    /// As [`Backbone::load`].
    pub fn backbone(&self, files: &ClipFiles) -> Result<Arc<Backbone>> {
        let ClipFiles { path, tokenizer } = files;
        let key = (path.canonicalize().unwrap_or_else(|_| path.clone()), tokenizer.clone());
        if let Some(backbone) = self.backbones.borrow().get(&key) {
            return Ok(backbone.clone());
        }
        let backbone = Arc::new(Backbone::load(path, tokenizer.as_deref(), &self.device)?);
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
    use crate::reward::{AestheticConfig, ClipScoreConfig, HpsConfig, PickScoreConfig};

    #[test]
    fn rewards_of_one_model_share_it() -> Result<()> {
        let fixtures = std::env::var_os("FLOWRL_FIXTURES")
            .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
        let files =
            |model: &str| ClipFiles { path: fixtures.join(model), tokenizer: Some(fixtures.join("clip_rewards/hf")) };
        let ClipFiles { path, tokenizer } = files("pickscore_micro");
        let predictor = fixtures.join("clip_rewards/predictor.pth");
        let loader = Loader::new(1, &Device::Cpu);
        let other_way = files("clip_rewards/../pickscore_micro"); // to the same folder
        let configs = [
            RewardConfig::with(ClipScoreConfig(files("pickscore_micro"))),
            RewardConfig::with(AestheticConfig { path, tokenizer, predictor }),
            RewardConfig::with(PickScoreConfig(other_way.clone())),
        ];
        let trained = loader.build(&configs)?;
        let evaluated = loader.build(&configs[1..])?;
        assert_eq!((loader.backbones.borrow().len(), trained.len() + evaluated.len()), (1, 5));
        let (one, two) = (loader.backbone(&files("pickscore_micro"))?, loader.backbone(&other_way)?);
        assert!(Arc::ptr_eq(&one, &two));
        assert_eq!(Arc::strong_count(&one), 5 + 2 + 1, "every reward holds the one that the loader has");
        loader.build(&[RewardConfig::with(HpsConfig(files("clip_rewards/open_clip/model.pt")))])?;
        assert_eq!(loader.backbones.borrow().len(), 2, "another model is another one");
        Ok(())
    }
}
