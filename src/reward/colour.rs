//! Ink and ground of the embedded task's pictures: a check that a policy trained for legible text keeps the colours.

use super::{Fit, Loader, Reward, RewardSpec, check_count, to_rgb8};
use crate::{
    data::{
        Prompt,
        glyphs::{Colour, GROUNDS, GlyphPrompt, INKS},
    },
    error::Result,
};
use candle_core::Tensor;
use image::{Rgb, RgbImage};
use serde::{Deserialize, Serialize};

/// One in so many pixels counts as ink for sure: thin strokes cover about a tenth of a picture.
const INK_SHARE: usize = 32;
/// The least distance of ink to ground, on the scale of [`distance`]: with less there is no ink.
const MIN_DISTANCE: f64 = 64.0;

/// `[[reward]]` with `name = "colour"`, which has no keys of its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColourConfig {}

impl RewardSpec for ColourConfig {
    fn fit(&self, prompt: &Prompt) -> Fit {
        match GlyphPrompt::parse(&prompt.text) {
            Ok(_) => Fit::Yes,
            Err(_) => Fit::No("it is not of the form \"417\" in red on yellow"),
        }
    }

    fn build(&self, _loader: &Loader) -> Result<Box<dyn Reward>> {
        Ok(Box::new(ColourMatch))
    }
}

/// The scorer named `colour`: 1, 0.5 or 0 for both, one or none of ink and ground right. Meant to be watched, not
/// to be rewarded.
pub struct ColourMatch;

impl Reward for ColourMatch {
    fn name(&self) -> &str {
        "colour"
    }

    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
        let score = |(ink, ground): (bool, bool)| 0.5 * f64::from(u8::from(ink) + u8::from(ground));
        Ok(colour_match(images, prompts)?.into_iter().map(|right| right.map(score)).collect())
    }
}

/// Whether ink and ground of each image are the prompt's; `None` where the prompt is not a [`GlyphPrompt`].
///
/// The ground is the median colour of the border, the ink the mean colour of the pixels farthest from it; each counts
/// as the palette's nearest. `images` is `[B, 3, H, W]` f32 in [0, 1], RGB.
///
/// # Errors
/// As [`to_rgb8`]; [`Error::Reward`](crate::Error::Reward) if there are not as many prompts as images.
pub fn colour_match(images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<(bool, bool)>>> {
    let pictures = to_rgb8(images)?;
    check_count("colour", pictures.len(), prompts)?;
    let right = |(picture, prompt): (&RgbImage, &Prompt)| {
        let want = GlyphPrompt::parse(&prompt.text).ok()?;
        let (ink, ground) = ink_and_ground(picture);
        Some((ink == Some(want.ink), ground == want.ground))
    };
    Ok(pictures.iter().zip(prompts).map(right).collect())
}

/// The palette's colours nearest to those of the picture; no ink where the picture is of one colour.
fn ink_and_ground(picture: &RgbImage) -> (Option<Colour>, Colour) {
    let ground = median(border(picture).collect());
    let mut pixels: Vec<[f64; 3]> = picture.pixels().map(rgb).collect();
    pixels.sort_by(|a, b| distance(*b, ground).total_cmp(&distance(*a, ground)));
    pixels.truncate(pixels.len().div_ceil(INK_SHARE));

    let count = pixels.len() as f64;
    let ink = [0, 1, 2].map(|c| pixels.iter().map(|pixel| pixel[c]).sum::<f64>() / count);
    let has_ink = distance(ink, ground) >= MIN_DISTANCE;
    (has_ink.then(|| nearest(&INKS, ink)), nearest(&GROUNDS, ground))
}

fn border(picture: &RgbImage) -> impl Iterator<Item = [f64; 3]> {
    let (right, bottom) = (picture.width() - 1, picture.height() - 1);
    let on_border = move |x, y| x == 0 || y == 0 || x == right || y == bottom;
    picture.enumerate_pixels().filter(move |&(x, y, _)| on_border(x, y)).map(|(_, _, pixel)| rgb(pixel))
}

/// The median of each channel.
fn median(colours: Vec<[f64; 3]>) -> [f64; 3] {
    [0, 1, 2].map(|c| {
        let mut values: Vec<f64> = colours.iter().map(|colour| colour[c]).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    })
}

fn nearest(palette: &[Colour], colour: [f64; 3]) -> Colour {
    let distance = |candidate: &Colour| distance(candidate.rgb().map(f64::from), colour);
    palette.iter().copied().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(Colour::Black)
}

/// Euclidean distance in sRGB, 0 to 442.
fn distance(a: [f64; 3], b: [f64; 3]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}

fn rgb(pixel: &Rgb<u8>) -> [f64; 3] {
    pixel.0.map(f64::from)
}
