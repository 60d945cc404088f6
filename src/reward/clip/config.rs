//! The keys of the rewards of the CLIP family.

use super::{Aesthetic, Alignment, ClipReward};
use crate::reward::config::{is_there, lacks};
use crate::reward::{Loader, Reward, RewardSpec};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where a model of the CLIP family is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClipFiles {
    /// Folder of transformers' (openai/clip-vit-large-patch14, yuvalkirstain/PickScore_v1), or
    /// open_clip's weights (HPS_v2.1_compressed.pt, or safetensors).
    pub path: PathBuf,
    /// A folder with CLIP's tokenizer, where the model's has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
}

impl ClipFiles {
    fn check(&self, name: &str) -> Result<(), String> {
        match self.path.as_os_str().is_empty() {
            true => Err(lacks(name, "path", "the folder or file of its model")),
            false => Ok(()),
        }
    }

    fn check_files(&self) -> Result<(), String> {
        is_there("path", &self.path, "give the folder or file of its model")?;
        let there = |tokenizer| is_there("tokenizer", tokenizer, "give the folder of CLIP's tokenizer");
        self.tokenizer.as_deref().map_or(Ok(()), there)
    }
}

/// Makes the configuration of a reward that compares picture and prompt, which has the keys of its model's files alone.
macro_rules! aligned {
    ($($(#[$doc:meta])* $Config:ident: $alignment:ident;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $Config(pub ClipFiles);

        impl RewardSpec for $Config {
            fn check(&self, name: &str, _deadline_s: u64) -> Result<(), String> {
                self.0.check(name)
            }

            fn check_files(&self) -> Result<(), String> {
                self.0.check_files()
            }

            fn files(&self) -> &'static [&'static str] {
                &["path", "tokenizer"]
            }

            fn build(&self, loader: &Loader) -> crate::Result<Box<dyn Reward>> {
                Ok(Box::new(ClipReward { alignment: Alignment::$alignment, backbone: loader.backbone(&self.0)? }))
            }
        }
    )+};
}

aligned! {
    /// The keys of `[[reward]]` with `name = "clip-score"`.
    ClipScoreConfig: ClipScore;
    /// The keys of `[[reward]]` with `name = "pick-score"`.
    PickScoreConfig: PickScore;
    /// The keys of `[[reward]]` with `name = "hps"`.
    HpsConfig: Hps;
}

/// The keys of `[[reward]]` with `name = "aesthetic"`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AestheticConfig {
    /// As clip-score's.
    pub path: PathBuf,
    /// As clip-score's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// LAION's layers on CLIP ViT-L/14, sac+logos+ava1-l14-linearMSE.pth.
    pub predictor: PathBuf,
}

impl AestheticConfig {
    fn clip(&self) -> ClipFiles {
        ClipFiles { path: self.path.clone(), tokenizer: self.tokenizer.clone() }
    }
}

impl RewardSpec for AestheticConfig {
    fn check(&self, name: &str, _deadline_s: u64) -> Result<(), String> {
        self.clip().check(name)?;
        match self.predictor.as_os_str().is_empty() {
            true => Err(lacks(name, "predictor", "sac+logos+ava1-l14-linearMSE.pth of LAION")),
            false => Ok(()),
        }
    }

    fn check_files(&self) -> Result<(), String> {
        self.clip().check_files()?;
        is_there("predictor", &self.predictor, "give sac+logos+ava1-l14-linearMSE.pth of LAION")
    }

    fn files(&self) -> &'static [&'static str] {
        &["path", "tokenizer", "predictor"]
    }

    fn build(&self, loader: &Loader) -> crate::Result<Box<dyn Reward>> {
        Ok(Box::new(Aesthetic::load(&self.predictor, loader.backbone(&self.clip())?)?))
    }
}
