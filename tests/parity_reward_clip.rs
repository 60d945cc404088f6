//! The rewards of the CLIP family against their own programs' arithmetic in torch and transformers
//! (tests/fixtures/clip_rewards, made by tests/peers/make_clip_rewards.py). FLOWRL_FIXTURES names another folder of the
//! same form.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use candle_core::{DType, Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::data::{Prompt, PromptSet};
use flowrl_dist::reward::{Reward, RewardConfig, RewardKind, build};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var_os("FLOWRL_FIXTURES")
        .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
    folder.join(name)
}

/// All four, each from another form of the same model: transformers' folder, and open_clip's tensors at `open_clip`.
fn rewards(open_clip: &Path) -> Result<Vec<Box<dyn Reward>>> {
    let config = |kind: RewardKind, path: &Path| RewardConfig {
        path: Some(path.to_path_buf()),
        tokenizer: Some(fixture("clip_rewards/hf")),
        predictor: (kind == RewardKind::Aesthetic).then(|| fixture("clip_rewards/predictor.pth")),
        ..RewardConfig::new(kind)
    };
    let transformers = fixture("pickscore_micro");
    build(
        &[
            config(RewardKind::ClipScore, &transformers),
            config(RewardKind::PickScore, &transformers),
            config(RewardKind::Aesthetic, &transformers),
            config(RewardKind::Hps, open_clip),
        ],
        1,
    )
}

struct Recorded {
    prompts: Vec<Prompt>,
    scores: Value,
    pictures: HashMap<String, Tensor>,
}

impl Recorded {
    fn open() -> Result<Recorded> {
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
    fn images(&self, name: &str) -> Result<Tensor> {
        Ok((self.pictures[name].permute((0, 3, 1, 2))?.to_dtype(DType::F32)? / 255.0)?)
    }

    fn check(&self, rewards: &[Box<dyn Reward>]) -> Result<()> {
        for name in self.scores.as_object().unwrap().keys() {
            let images = self.images(name)?;
            for reward in rewards {
                let recorded: Vec<f64> = serde_json::from_value(self.scores[name][reward.name()].clone()).unwrap();
                let scores = reward.score(&images, &self.prompts)?;
                let errors = scores.iter().zip(&recorded).map(|(score, recorded)| (score.unwrap() - recorded).abs());
                let worst = errors.fold(0.0, f64::max);
                eprintln!("{name} {}: {worst:.1e}", reward.name());
                assert_eq!(scores.len(), recorded.len());
                assert!(worst < 1e-5, "{name} {}: {scores:?}, not {recorded:?}", reward.name());
            }
        }
        Ok(())
    }
}

#[test]
fn parity_of_the_clip_family_with_its_programs() -> Result<()> {
    Recorded::open()?.check(&rewards(&fixture("clip_rewards/open_clip/model.pt"))?)
}

/// The same from safetensors under open_clip's names.
#[test]
fn parity_of_open_clip_in_safetensors() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let tensors =
        candle_core::pickle::read_all_with_key(fixture("clip_rewards/open_clip/model.pt"), Some("state_dict"))?;
    let tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
    candle_core::safetensors::save(&tensors, folder.path().join("open_clip_model.safetensors"))?;
    let sizes = "open_clip_config.json";
    std::fs::copy(fixture("clip_rewards/open_clip").join(sizes), folder.path().join(sizes)).unwrap();
    Recorded::open()?.check(&rewards(folder.path())?[3..])
}

/// Bit-equal whatever comes with an image; equal prompts, as of a group, are encoded once.
#[test]
fn a_score_depends_on_its_image_and_prompt_alone() -> Result<()> {
    let recorded = Recorded::open()?;
    let images = recorded.images("wide")?;
    for reward in rewards(&fixture("clip_rewards/open_clip/model.pt"))? {
        let together = reward.score(&images, &recorded.prompts)?;
        for (i, score) in together.iter().enumerate() {
            let alone = reward.score(&images.narrow(0, i, 1)?, &recorded.prompts[i..=i])?;
            assert_eq!(alone, [*score], "{} {i}", reward.name());
        }
    }
    Ok(())
}

#[test]
fn a_model_that_is_none_is_refused_with_a_remedy() {
    let error = |config: RewardConfig| build(&[config], 1).err().unwrap().to_string();
    let pick = |path: PathBuf| RewardConfig { path: Some(path), ..RewardConfig::new(RewardKind::PickScore) };
    assert!(error(RewardConfig::new(RewardKind::PickScore)).contains("needs path, the folder"));
    assert!(error(pick("no/such".into())).contains("there is nothing at this path"));
    assert!(error(pick(fixture("clip_rewards/hf"))).contains("safetensors"));
    assert!(error(pick(fixture("clip_rewards/predictor.pth"))).contains("holds no CLIP model"));
    assert!(error(pick(fixture("pickscore_micro"))).contains("with the reward's key tokenizer"));
    let aesthetic = RewardConfig {
        path: Some(fixture("pickscore_micro")),
        tokenizer: Some(fixture("clip_rewards/hf")),
        predictor: Some(fixture("clip_rewards/open_clip/model.pt")),
        ..RewardConfig::new(RewardKind::Aesthetic)
    };
    assert!(error(aesthetic).contains("lacks layers.0.weight"));
}
