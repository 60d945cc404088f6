//! Rewards: one file each, one number an image.

mod colour;
pub mod geneval;
mod jpeg;
mod ocr;
mod pixels;
pub mod preprocess;

pub use colour::{ColourMatch, colour_match};
pub use jpeg::Jpeg;
pub use ocr::{Ocr, edit_reward};
pub use pixels::to_rgb8;

use crate::{
    advantage::Scores,
    data::Prompt,
    error::{Error, Result},
};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Scores images against their prompts.
pub trait Reward {
    /// The name in the configuration and in the metrics.
    fn name(&self) -> &str;
    /// One score an image; `None` where the reward does not apply to the prompt.
    ///
    /// `images` is `[B, 3, H, W]` f32 in [0, 1], RGB. An image's score does not depend on the others in the call.
    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>>;
}

/// Which rewards there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RewardKind {
    /// Does the picture read as the text in the prompt's double quotes? [`Ocr`], 0 to 1.
    Ocr,
    /// Has the picture the glyph prompt's ink and ground? [`ColourMatch`], 0, 0.5 or 1.
    Colour,
    /// Minus the size of the picture as a JPEG file in kB: [`Jpeg`].
    JpegCompressibility,
    /// The size of the picture as a JPEG file in kB: [`Jpeg`].
    JpegIncompressibility,
}

/// One `[[reward]]` of the configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardConfig {
    /// The reward.
    pub name: RewardKind,
    /// What its score is multiplied by before the scores are summed.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// The rewards of a configuration, in its order; each may use up to `threads` threads.
///
/// # Errors
/// [`Error::Usage`] for a weight that is not finite or a reward that is named twice.
pub fn build(configs: &[RewardConfig], threads: usize) -> Result<Vec<Box<dyn Reward>>> {
    let mut rewards: Vec<Box<dyn Reward>> = Vec::with_capacity(configs.len());
    for config in configs {
        let reward: Box<dyn Reward> = match config.name {
            RewardKind::Ocr => Box::new(Ocr::new(threads)?),
            RewardKind::Colour => Box::new(ColourMatch),
            RewardKind::JpegCompressibility => Box::new(Jpeg::Compressibility),
            RewardKind::JpegIncompressibility => Box::new(Jpeg::Incompressibility),
        };
        if !config.weight.is_finite() {
            let message = format!("reward {}: weight {} must be a finite number", reward.name(), config.weight);
            return Err(Error::Usage(message));
        }
        if rewards.iter().any(|earlier| earlier.name() == reward.name()) {
            let message = format!("reward {}: named twice; name it once, with one weight", reward.name());
            return Err(Error::Usage(message));
        }
        rewards.push(reward);
    }
    Ok(rewards)
}

/// Refuses scores that cannot be trained on.
///
/// # Errors
/// [`Error::NotFinite`] for a score that is not finite, [`Error::Reward`] for an image no reward applies to (both name
/// image and prompt), or a number of scores that is not the number of prompts.
pub fn check_scores(rewards: &[Scores], prompts: &[Prompt]) -> Result<()> {
    for Scores { name, scores, .. } in rewards {
        check_count(name, scores.len(), prompts)?;
    }
    for (image, prompt) in prompts.iter().enumerate() {
        let place = || format!("image {image}, prompt {} {:?}", prompt.index, prompt.text);
        for Scores { name, scores, .. } in rewards {
            if let Some(score) = scores[image].filter(|score| !score.is_finite()) {
                return Err(Error::NotFinite(format!("reward {name}: score {score} for {}", place())));
            }
        }
        if rewards.iter().all(|reward| reward.scores[image].is_none()) {
            let name = rewards.iter().map(|reward| reward.name.as_str()).collect::<Vec<_>>().join(", ");
            let message = format!("none applies to {}; name one that does or take the prompt out", place());
            return Err(Error::Reward { name, message });
        }
    }
    Ok(())
}

/// Refuses another number of images (or scores) than of prompts.
fn check_count(name: &str, images: usize, prompts: &[Prompt]) -> Result<()> {
    if images == prompts.len() {
        return Ok(());
    }
    let message = format!("{images} images for {} prompts; pass one prompt an image", prompts.len());
    Err(Error::Reward { name: name.to_string(), message })
}

/// An error of the reward `name`: `.map_err(failed(name))`.
fn failed<E: std::fmt::Display>(name: &str) -> impl FnOnce(E) -> Error {
    move |error| Error::Reward { name: name.to_string(), message: error.to_string() }
}
