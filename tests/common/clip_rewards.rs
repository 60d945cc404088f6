//! The recorded scores of the CLIP family (tests/fixtures/clip_rewards, made by tests/peers/make_clip_rewards.py), and the
//! rewards that must equal them. FLOWRL_FIXTURES names another folder of the same form.

use candle_core::{DType, Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::data::{Prompt, PromptSet};
use flowrl_dist::reward::{
    AestheticConfig, ClipFiles, ClipScoreConfig, HpsConfig, Loader, PickScoreConfig, Reward, RewardConfig, RewardKind,
    RewardSettings,
};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var_os("FLOWRL_FIXTURES")
        .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
    folder.join(name)
}

/// One of the four: `path` is its model, of either form.
pub fn config(kind: RewardKind, path: &Path) -> RewardConfig {
    let (path, tokenizer) = (path.to_path_buf(), Some(fixture("clip_rewards/hf")));
    let files = ClipFiles { path: path.clone(), tokenizer: tokenizer.clone() };
    RewardConfig::with(match kind {
        RewardKind::ClipScore => RewardSettings::from(ClipScoreConfig(files)),
        RewardKind::PickScore => PickScoreConfig(files).into(),
        RewardKind::Hps => HpsConfig(files).into(),
        RewardKind::Aesthetic => {
            AestheticConfig { path, tokenizer, predictor: fixture("clip_rewards/predictor.pth") }.into()
        }
        other => panic!("{other:?} is none of the four"),
    })
}

/// All four, each from another form of the same model: transformers' folder, and open_clip's tensors at `open_clip`.
pub fn rewards(open_clip: &Path, device: &Device) -> Result<Vec<Box<dyn Reward>>> {
    let transformers = fixture("pickscore_micro");
    Loader::new(1, device).build(&[
        config(RewardKind::ClipScore, &transformers),
        config(RewardKind::PickScore, &transformers),
        config(RewardKind::Aesthetic, &transformers),
        config(RewardKind::Hps, open_clip),
    ])
}

pub struct Recorded {
    pub prompts: Vec<Prompt>,
    scores: Value,
    pictures: HashMap<String, Tensor>,
}

impl Recorded {
    pub fn open() -> Result<Recorded> {
        let meta = std::fs::read_to_string(fixture("clip_rewards/meta.json")).unwrap();
        let meta: Value = serde_json::from_str(&meta).unwrap();
        let texts = meta["prompts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_string());
        Ok(Recorded {
            prompts: texts.collect::<PromptSet>().prompts,
            scores: meta["scores"].clone(),
            pictures: candle_core::safetensors::load(fixture("clip_rewards/pictures.safetensors"), &Device::Cpu)?,
        })
    }

    /// `[B, 3, H, W]` in [0, 1].
    pub fn images(&self, name: &str) -> Result<Tensor> {
        Ok((self.pictures[name].permute((0, 3, 1, 2))?.to_dtype(DType::F32)? / 255.0)?)
    }

    /// Scores of all pictures within `tolerance` of the recorded ones.
    pub fn check(&self, rewards: &[Box<dyn Reward>], tolerance: f64) -> Result<()> {
        for name in self.scores.as_object().unwrap().keys() {
            let images = self.images(name)?;
            for reward in rewards {
                let recorded: Vec<f64> = serde_json::from_value(self.scores[name][reward.name()].clone()).unwrap();
                let scores = reward.score(&images, &self.prompts)?;
                let errors = scores.iter().zip(&recorded).map(|(score, recorded)| (score.unwrap() - recorded).abs());
                let worst = errors.fold(0.0, f64::max);
                eprintln!("{name} {}: {worst:.1e}", reward.name());
                assert_eq!(scores.len(), recorded.len());
                assert!(worst < tolerance, "{name} {}: {scores:?}, not {recorded:?}", reward.name());
            }
        }
        Ok(())
    }
}
