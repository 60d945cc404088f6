//! The rewards of the CLIP family on a GPU, in f32, against the recorded scores of their own programs.

use super::gpu;
use crate::recorded::{Recorded, fixture, rewards};
use candle_core::{D, DType, Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::model::clip::Clip;

const TOLERANCE: f64 = 1e-4;

/// Four rewards on two forms of the model; and a score depends on nothing that comes with its image.
#[test]
fn parity_of_the_clip_family_with_its_programs_on_the_gpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let recorded = Recorded::open()?;
    let rewards = rewards(&fixture("clip_rewards/open_clip/model.pt"), &gpu)?;
    recorded.check(&rewards, TOLERANCE)?;
    let images = recorded.images("wide")?;
    for reward in rewards {
        let together = reward.score(&images, &recorded.prompts)?;
        for (i, score) in together.iter().enumerate() {
            let alone = reward.score(&images.narrow(0, i, 1)?, &recorded.prompts[i..=i])?;
            let off = (alone[0].unwrap() - score.unwrap()).abs();
            println!("{} {i}: alone and with others off by {off:.1e}", reward.name());
            assert!(off < 1e-6, "{} {i}: {alone:?} alone, {score:?} with others", reward.name());
        }
    }
    Ok(())
}

/// pickscore_micro on the pixels and tokens that are recorded with it.
#[test]
fn parity_of_pick_score_with_transformers_on_the_gpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let folder = fixture("pickscore_micro");
    let io = candle_core::safetensors::load(folder.join("io.safetensors"), &Device::Cpu)?;
    let clip = Clip::open(&folder, DType::F32, &gpu)?;
    let unit = |features: Tensor| -> candle_core::Result<Tensor> {
        let features = features.to_device(&Device::Cpu)?;
        features.broadcast_div(&features.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)
    };
    let images = unit(clip.image_features(&io["in.pixel_values"].to_device(&gpu)?)?)?;
    let texts = unit(clip.text_features(&io["in.input_ids"].to_dtype(DType::U32)?.to_vec2()?)?)?;
    let cosines = (images * texts)?.sum(1)?.to_vec1::<f32>()?;
    for (name, factor) in [("out.pickscore_over_26", 1.0 / 26.0), ("out.pickscore", 1.0)] {
        let recorded = io[name].to_dtype(DType::F64)?.to_vec1::<f64>()?;
        assert_eq!(cosines.len(), recorded.len());
        for (&cosine, recorded) in cosines.iter().zip(recorded) {
            let found = factor * clip.logit_scale().exp() * f64::from(cosine);
            println!("{name}: {found}, recorded {recorded}");
            assert!((found - recorded).abs() < TOLERANCE, "{name}: {found}, not {recorded}");
        }
    }
    Ok(())
}
