//! The rewards of the CLIP family against their own programs' arithmetic in torch and transformers
//! (tests/fixtures/clip_rewards, made by tests/peers/make_clip_rewards.py). FLOWRL_FIXTURES names another folder of the
//! same form.

use crate::recorded::{Recorded, fixture, rewards};
use candle_core::{Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::reward::{AestheticConfig, ClipFiles, PickScoreConfig, RewardConfig, RewardKind, build};
use serde_json::Value;
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;

#[test]
fn parity_of_the_clip_family_with_its_programs() -> Result<()> {
    Recorded::open()?.check(&rewards(&fixture("clip_rewards/open_clip/model.pt"), &Device::Cpu)?, 1e-5)
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
    Recorded::open()?.check(&rewards(folder.path(), &Device::Cpu)?[3..], 1e-5)
}

/// Bit-equal whatever comes with an image; equal prompts, as of a group, are encoded once.
#[test]
fn a_score_depends_on_its_image_and_prompt_alone() -> Result<()> {
    let recorded = Recorded::open()?;
    let images = recorded.images("wide")?;
    for reward in rewards(&fixture("clip_rewards/open_clip/model.pt"), &Device::Cpu)? {
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
    let pick = |path: PathBuf| RewardConfig::with(PickScoreConfig(ClipFiles { path, tokenizer: None }));
    assert!(error(RewardConfig::new(RewardKind::PickScore)).contains("needs path, the folder"));
    assert!(error(pick("no/such".into())).contains("there is nothing at this path"));
    assert!(error(pick(fixture("clip_rewards/hf"))).contains("safetensors"));
    assert!(error(pick(fixture("clip_rewards/predictor.pth"))).contains("holds no CLIP model"));
    assert!(error(pick(fixture("pickscore_micro"))).contains("with the reward's key tokenizer"));
    let aesthetic = AestheticConfig {
        path: fixture("pickscore_micro"),
        tokenizer: Some(fixture("clip_rewards/hf")),
        predictor: fixture("clip_rewards/open_clip/model.pt"),
    };
    assert!(error(RewardConfig::with(aesthetic)).contains("lacks layers.0.weight"));
}

/// PickScore is logged in both its scalings, by a run and by its evaluations: as its program has it, and as papers quote it.
#[test]
fn a_run_tells_pick_score_raw_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    let text = format!(
        "[[reward]]\nname = \"pick-score\"\npath = {:?}\ntokenizer = {:?}\n",
        fixture("pickscore_micro").canonicalize().unwrap(),
        fixture("clip_rewards/hf").canonicalize().unwrap()
    );
    std::fs::write(&file, text).unwrap();
    let out = folder.path().join("out");
    let small = [
        "run.updates=1",
        "eval.prompts=2",
        "eval.steps=1",
        "sampler.steps=1",
        "batch.prompts=2",
        "batch.images_per_prompt=2",
        "batch.timesteps=1",
    ];
    let output = Command::new(env!("CARGO_BIN_EXE_flowrl-dist"))
        .arg("train")
        .args([&"--config".as_ref(), &file.as_os_str(), &"--out".as_ref(), &out.as_os_str()])
        .args(small.iter().flat_map(|setting| ["--set", setting]))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for prefix in ["reward", "eval.reward"] {
        let [mean, raw] = ["mean", "raw.mean"].map(|unit| {
            let name = format!("{prefix}.pick-score.{unit}");
            lines.iter().find_map(|line| line[&name].as_f64()).unwrap_or_else(|| panic!("no {name}: {metrics}"))
        });
        assert!(mean != 0.0 && (raw - 26.0 * mean).abs() < 1e-9 * raw.abs(), "{prefix}: {mean} and {raw}");
    }
}
