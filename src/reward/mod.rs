//! Rewards: one file each, one number an image.

mod clip;
mod colour;
mod config;
pub mod geneval;
mod jpeg;
mod loader;
mod ocr;
mod pixels;
pub mod preprocess;
pub mod remote;
mod scoring;
pub mod serve;
pub mod shapes;
mod sharpness;
mod token;

pub use clip::{
    Aesthetic, AestheticConfig, Alignment, Backbone, ClipFiles, ClipReward, ClipScoreConfig, HpsConfig, PickScoreConfig,
};
pub use colour::{ColourConfig, ColourMatch, colour_match};
pub use config::{RewardConfig, RewardKind, RewardSettings, RewardSpec};
pub use jpeg::{CompressibilityConfig, IncompressibilityConfig, Jpeg};
pub use loader::{Loader, build};
pub use ocr::{Ocr, OcrConfig, edit_reward, found_reward, target};
pub use pixels::to_rgb8;
pub use remote::{Remote, RemoteConfig};
pub use scoring::{Overlap, Rewards, Scoring};
pub use shapes::Shapes;
pub use sharpness::Sharpness;
pub use token::Token;

use crate::{
    advantage::Scores,
    data::Prompt,
    error::{Error, Result},
};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Scores images against their prompts.
pub trait Reward: Send + Sync {
    /// The name in the metrics.
    fn name(&self) -> &str;

    /// One score an image; `None` where the reward does not apply to the prompt.
    ///
    /// `images` is `[B, 3, H, W]` f32 in [0, 1], RGB. An image's score does not depend on the others in the call.
    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>>;

    /// Like [`Reward::score`], but a score that could not be computed is reported as failed where the configuration allows
    /// the run to go on without it.
    fn attempt(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Attempt> {
        Ok(Attempt { scores: self.score(images, prompts)?, ..Attempt::default() })
    }

    /// How it is asked where it is computed elsewhere; `None`: it is computed here.
    fn requests(&self) -> Option<Requests> {
        None
    }

    /// Whether it is ready to score: asked once, before anything is trained.
    ///
    /// # Errors
    /// [`Error::Reward`]: it is not, and what to do; [`Error::Usage`]: the server has no such reward.
    fn ready(&self) -> Result<()> {
        Ok(())
    }

    /// Other units that its score is quoted in: their name and what the score is multiplied by.
    fn scalings(&self) -> &[(&str, f64)] {
        &[]
    }
}

/// What can be said of a reward and a prompt before there is a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// The reward applies.
    Yes,
    /// It applies, but not in full, for this reason: because of these characters.
    Partly(&'static str, BTreeSet<char>),
    /// It does not, and why: the prompt's pictures have no score.
    No(&'static str),
    /// Only a server can say.
    Unknown,
}

/// How a reward is asked that is computed elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requests {
    /// Images of a request, at most.
    pub images: usize,
    /// Requests under way, at most.
    pub at_once: usize,
}

/// What came of scoring images.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// One an image; `None` where the reward does not apply or failed.
    pub scores: Vec<Option<f64>>,
    /// The images whose score could not be had. Their groups cannot be compared: they are left out.
    pub failed: Vec<usize>,
    /// Whether the reward has failed for good: more images need not be asked for.
    pub broken: bool,
}

impl Attempt {
    /// For images that are not asked for, because the reward has failed for good.
    fn broken(images: usize) -> Self {
        Self { scores: vec![None; images], failed: (0..images).collect(), broken: true }
    }

    /// Adds what came of the next images.
    pub(crate) fn append(&mut self, next: Attempt) {
        let before = self.scores.len();
        self.failed.extend(next.failed.into_iter().map(|image| before + image));
        self.scores.extend(next.scores);
        self.broken |= next.broken;
    }
}

/// Refuses scores that cannot be trained on; `failed` images may have none, their groups are left out.
///
/// # Errors
/// [`Error::NotFinite`] for a score that is not finite, [`Error::Reward`] for an image to which no reward
/// with a weight applies (both name image and prompt), or a number of scores that is not the number of prompts.
pub fn check_scores(rewards: &[Scores], prompts: &[Prompt], failed: &BTreeSet<usize>) -> Result<()> {
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
        let counted = rewards.iter().filter(|reward| reward.weight != 0.0);
        if !failed.contains(&image) && counted.clone().all(|reward| reward.scores[image].is_none()) {
            let name = counted.map(|reward| reward.name.as_str()).collect::<Vec<_>>().join(", ");
            let message = format!("none applies to {}; give weight to one that does or take the prompt out", place());
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
