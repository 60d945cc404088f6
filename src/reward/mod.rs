//! Rewards: one file each, one number an image.

use crate::{data::Prompt, error::Result};
use candle_core::Tensor;

/// Scores images against their prompts.
pub trait Reward {
    /// The name in the configuration and in the metrics.
    fn name(&self) -> &str;
    /// One score an image; `None` where the reward does not apply to the prompt.
    ///
    /// `images` is `[B, 3, H, W]` f32 in [0, 1], RGB. An image's score does not depend on the others in the call.
    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>>;
}
