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
mod score;
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
pub use score::{ScoreResult, check_scores, describe_scalings};
pub use scoring::{Overlap, Rewards, Scoring};
pub use shapes::Shapes;
pub use sharpness::Sharpness;
pub use token::Token;

use crate::advantage::Score;
use crate::data::Prompt;
use crate::error::{Error, Result};
use candle_core::Tensor;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Scores images against their prompts.
pub trait Reward: Send + Sync {
    /// The name in the metrics.
    fn name(&self) -> &str;

    /// One score per image; `None` where the reward does not apply to the prompt.
    ///
    /// `images` is `[B, 3, H, W]` f32 in [0, 1], RGB. An image's score does not depend on the others in the call.
    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>>;

    /// Like [`Reward::score`], but a score that is unavailable is reported as failed where the configuration allows the run
    /// to go on without it.
    fn try_score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<ScoreResult> {
        let scores = self.score(images, prompts)?.into_iter().map(Score::from).collect();
        Ok(ScoreResult { scores, unavailable: false })
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

impl<R: Reward + ?Sized> Reward for Arc<R> {
    fn name(&self) -> &str {
        (**self).name()
    }
    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
        (**self).score(images, prompts)
    }
    fn try_score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<ScoreResult> {
        (**self).try_score(images, prompts)
    }
    fn requests(&self) -> Option<Requests> {
        (**self).requests()
    }
    fn ready(&self) -> Result<()> {
        (**self).ready()
    }
    fn scalings(&self) -> &[(&str, f64)] {
        (**self).scalings()
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
