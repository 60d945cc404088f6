//! Rewards of the task `shapes`: how many of the facts that a prompt states its picture shows, GenEval (arXiv 2310.11513) in
//! small.

mod facts;
mod objects;

pub use facts::{Fact, FactKind, credit, facts, is_strict};
pub use objects::{Seen, objects};

use super::{Fit, Loader, Reward, RewardSpec, check_count, to_rgb8};
use crate::data::Prompt;
use crate::data::shapes::ShapesPrompt;
use crate::error::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// `[[reward]]` with `name = "shapes"`, which has no keys of its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShapesConfig {}

impl RewardSpec for ShapesConfig {
    fn fit(&self, prompt: &Prompt) -> Fit {
        fit(prompt)
    }

    fn build(&self, _loader: &Loader) -> Result<Box<dyn Reward>> {
        Ok(Box::new(Shapes::Partial))
    }
}

/// `[[reward]]` with `name = "shapes-strict"`, which has no keys of its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShapesStrictConfig {}

impl RewardSpec for ShapesStrictConfig {
    fn fit(&self, prompt: &Prompt) -> Fit {
        fit(prompt)
    }

    fn build(&self, _loader: &Loader) -> Result<Box<dyn Reward>> {
        Ok(Box::new(Shapes::Strict))
    }
}

/// Whether a prompt states facts.
fn fit(prompt: &Prompt) -> Fit {
    match ShapesPrompt::parse(&prompt.text) {
        Ok(_) => Fit::Yes,
        Err(_) => Fit::No("it is not of the form \"two red circles left of a blue square\""),
    }
}

/// The two ways to sum up the facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shapes {
    /// `shapes`: the mean credit of the facts, in [0, 1]: what is trained on.
    Partial,
    /// `shapes-strict`: 1 if every fact is right in full, else 0: what is reported.
    Strict,
}

impl Reward for Shapes {
    fn name(&self) -> &str {
        match self {
            Shapes::Partial => "shapes",
            Shapes::Strict => "shapes-strict",
        }
    }

    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
        let pictures = to_rgb8(images)?;
        check_count(self.name(), pictures.len(), prompts)?;
        let score = |(picture, prompt): (&image::RgbImage, &Prompt)| {
            let facts = facts(&ShapesPrompt::parse(&prompt.text).ok()?, &objects(picture));
            Some(match self {
                Shapes::Partial => credit(&facts),
                Shapes::Strict => f64::from(u8::from(is_strict(&facts))),
            })
        };
        Ok(pictures.iter().zip(prompts).map(score).collect())
    }
}
