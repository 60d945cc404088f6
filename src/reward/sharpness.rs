//! How sharp a picture is: a continuous reward that needs no prompt, as DDPO's (arXiv 2305.13301) compressibility.

use super::{Loader, Reward, RewardSpec, check_count};
use crate::data::Prompt;
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

/// The share of the pixels that are taken for edges.
const EDGES: f64 = 0.1;

/// `[[reward]]` with `name = "sharpness"`, which has no keys of its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharpnessConfig {}

impl RewardSpec for SharpnessConfig {
    fn build(&self, _loader: &Loader) -> Result<Box<dyn Reward>> {
        Ok(Box::new(Sharpness))
    }
}

/// The scorer named `sharpness`: the mean step of brightness, to the right or down, whichever is larger, over the tenth of
/// the pixels where it is largest. In [0, 1]: 0 for one colour, 1 for edges from black to white in one pixel. Brightness is the
/// largest of red, green and blue.
pub struct Sharpness;

impl Reward for Sharpness {
    fn name(&self) -> &str {
        "sharpness"
    }

    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
        check_count(self.name(), images.dim(0)?, prompts)?;
        let (count, _, height, width) = images.dims4()?;
        let brightness = images.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.max(1)?; // [B, H, W]
        let brightness = brightness.reshape((count, height * width))?.to_vec2::<f32>()?;
        Ok(brightness.iter().map(|picture| Some(sharpness(picture, width))).collect())
    }
}

/// Of the brightness of a picture, row by row.
fn sharpness(brightness: &[f32], width: usize) -> f64 {
    let step = |pixel: usize, to: usize| f64::from((brightness[to] - brightness[pixel]).abs());
    let mut steps: Vec<f64> = (0..brightness.len())
        .map(|pixel| {
            let right = if (pixel + 1) % width == 0 { 0.0 } else { step(pixel, pixel + 1) };
            let down = if pixel + width < brightness.len() { step(pixel, pixel + width) } else { 0.0 };
            right.max(down)
        })
        .collect();
    steps.sort_by(|a, b| b.total_cmp(a));
    steps.truncate(((brightness.len() as f64 * EDGES).round() as usize).max(1));
    steps.iter().sum::<f64>().min(steps.len() as f64) / steps.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(pixel: impl Fn(usize, usize) -> f32) -> Result<f64> {
        let values: Vec<f32> =
            (0..3).flat_map(|_| (0..400).map(|i| pixel(i % 20, i / 20)).collect::<Vec<_>>()).collect();
        let images = Tensor::from_vec(values, (1, 3, 20, 20), &Device::Cpu)?;
        let scores = Sharpness.score(&images, &[Prompt::new(0, "anything")])?;
        Ok(scores[0].unwrap())
    }

    #[test]
    fn edges_count_by_their_steps() -> Result<()> {
        assert_eq!(score(|_, _| 0.7)?, 0.0);
        // Two edges of 20 pixels: a tenth of 400.
        assert_eq!(score(|x, _| if (7..13).contains(&x) { 1.0 } else { 0.0 })?, 1.0);
        // One edge of 20 pixels, half as high: 20 of 40 pixels with a step of 0.5.
        assert!((score(|x, _| if x < 7 { 0.0 } else { 0.5 })? - 0.25).abs() < 1e-6);
        // The same edges over four pixels: 0.25 a pixel, and there are enough of them.
        assert!((score(|_, y| ((y as f32 - 7.0) / 4.0).clamp(0.0, 1.0))? - 0.25).abs() < 1e-6);
        Ok(())
    }
}
