//! What comes of scoring images by a reward, and what of it can be trained on.

use super::{Reward, check_count};
use crate::advantage::{Score, Scores};
use crate::data::Prompt;
use crate::error::{Error, Result};
use crate::observe::Metrics;
use serde::{Deserialize, Serialize};

/// What came of scoring images by one reward.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ScoreResult {
    /// One per image.
    pub scores: Vec<Score>,
    /// Whether the reward has failed for good: more images need not be asked for.
    pub unavailable: bool,
}

impl ScoreResult {
    /// For images that are not asked for, because the reward has failed for good.
    pub(super) fn unavailable(images: usize) -> Self {
        Self { scores: vec![Score::Failed; images], unavailable: true }
    }

    /// Adds what came of the next images.
    pub(crate) fn append(&mut self, next: ScoreResult) {
        self.scores.extend(next.scores);
        self.unavailable |= next.unavailable;
    }
}

/// Refuses scores that cannot be trained on.
///
/// # Errors
/// [`Error::NotFinite`] for a score that is not finite, [`Error::Reward`] for an image to which no
/// reward with a weight applies, though none failed (both name image and prompt), or a number of
/// scores that is not the number of prompts.
pub fn check_scores(rewards: &[Scores], prompts: &[Prompt]) -> Result<()> {
    for Scores { name, scores, .. } in rewards {
        check_count(name, scores.len(), prompts)?;
    }
    for (image, prompt) in prompts.iter().enumerate() {
        let place = || format!("image {image}, prompt {} {:?}", prompt.index, prompt.text);
        for Scores { name, scores, .. } in rewards {
            if let Some(score) = scores[image].value().filter(|score| !score.is_finite()) {
                return Err(Error::NotFinite(format!("reward {name}: score {score} for {}", place())));
            }
        }
        let counted = rewards.iter().filter(|reward| reward.weight != 0.0);
        let has_failed = rewards.iter().any(|reward| reward.scores[image] == Score::Failed);
        if !has_failed && counted.clone().all(|reward| reward.scores[image] == Score::NotApplicable) {
            let name = counted.map(|reward| reward.name.as_str()).collect::<Vec<_>>().join(", ");
            let message = format!("none applies to {}; give weight to one that does or take the prompt out", place());
            return Err(Error::Reward { name, message });
        }
    }
    Ok(())
}

/// Adds the rewards' means in the other units in which they are quoted: `PREFIX.NAME.UNIT.mean`
/// beside `PREFIX.NAME.mean`.
pub fn describe_scalings(rewards: &[Box<dyn Reward>], prefix: &str, metrics: &mut Metrics) {
    for reward in rewards {
        let name = reward.name();
        for (unit, factor) in reward.scalings() {
            if let Some(mean) = metrics.get(&format!("{prefix}.{name}.mean")) {
                metrics.set(&format!("{prefix}.{name}.{unit}.mean"), factor * mean);
            }
        }
    }
}
