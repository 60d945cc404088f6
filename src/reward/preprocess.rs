//! Pictures as the CLIP family's image processors hand them on: resized, cropped or padded, normalised.
//!
//! The arithmetic is that of the programs whose scores are compared: Pillow's resampling in fixed point for those that
//! work on eight-bit pictures, torchvision's for those that work on tensors. Rows come before columns, as in the Pillow that
//! DiffusionNFT pins (10.4); Pillow 13 turns that round for some pictures that are more than twice as high as wide.

use crate::error::Result;
use candle_core::{Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;
use std::ops::Range;

/// How a model of the CLIP family sees a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preprocess {
    /// `CLIPImageProcessor` of transformers: Pillow's bicubic resize to the shortest edge in eight bits, centre crop.
    /// PickScore and the aesthetic score.
    Pillow,
    /// `Resize` and `CenterCrop` of torchvision on tensors: bilinear. CLIPScore in flow_grpo/clip_scorer.py.
    Tensor,
    /// Bicubic on tensors to fit the longest edge, padded with black: HPSv2.1, flow_grpo/hpsv2_scorer.py.
    Padded,
}

/// Mean and standard deviation of the three channels that OpenAI's CLIP, and all after it, were trained with.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

impl Preprocess {
    /// The pictures at `size` pixels a side, normalised, `[B, 3, size, size]` f32.
    pub fn run(self, pictures: &[RgbImage], size: usize) -> Result<Tensor> {
        let one = |picture| match self {
            Preprocess::Pillow => {
                let bytes = resized_and_cropped(picture, size);
                // As transformers: times 1/255 in f64, then f32.
                normalised(&bytes.iter().map(|&byte| (f64::from(byte) * (1.0 / 255.0)) as f32).collect::<Vec<_>>())
            }
            Preprocess::Tensor => {
                let first = |side: usize| ((side - size) as f64 / 2.0).round_ties_even() as usize;
                let square =
                    shortest_edge(picture, size).map(|side| Line { side, kept: first(side)..first(side) + size });
                normalised(&resize(&unit(picture), dimensions(picture), square, Filter::Bilinear))
            }
            Preprocess::Padded => normalised(&fitted(picture, size)),
        };
        let all: Vec<f32> = pictures.par_iter().map(one).collect::<Vec<_>>().concat();
        Ok(Tensor::from_vec(all, (pictures.len(), 3, size, size), &Device::Cpu)?)
    }
}

/// The picture as Pillow resizes it, bicubic, to `size` pixels on its shortest edge, and its middle square:
/// `[size, size, 3]`.
pub fn resized_and_cropped(picture: &RgbImage, size: usize) -> Vec<u8> {
    let first = |side: usize| (side - size) / 2;
    let square = shortest_edge(picture, size).map(|side| Line { side, kept: first(side)..first(side) + size });
    resize(picture.as_raw(), dimensions(picture), square, Filter::Bicubic)
}

/// Bicubic to fit a square of `size`, padded with black: `[size, size, 3]` in [0, 1].
fn fitted(picture: &RgbImage, size: usize) -> Vec<f32> {
    let (h, w) = dimensions(picture);
    let scale = size as f64 / h.max(w) as f64;
    let to = |side: usize| ((side as f64 * scale).round_ties_even() as usize).max(1);
    let (to_h, to_w) = (to(h), to(w));
    let resized = resize(&unit(picture), (h, w), [Line::whole(to_h), Line::whole(to_w)], Filter::Bicubic);
    let (top, left) = ((size - to_h) / 2, (size - to_w) / 2);
    let mut padded = vec![0.0; 3 * size * size];
    for (y, row) in resized.chunks_exact(3 * to_w).enumerate() {
        let start = 3 * ((top + y) * size + left);
        padded[start..start + row.len()].copy_from_slice(row);
    }
    padded
}

/// Height and width.
fn dimensions(picture: &RgbImage) -> (usize, usize) {
    (picture.height() as usize, picture.width() as usize)
}

/// `[H, W, 3]` in [0, 1].
fn unit(picture: &RgbImage) -> Vec<f32> {
    picture.as_raw().iter().map(|&byte| f32::from(byte) / 255.0).collect()
}

/// Height and width with the shortest edge at `size`, the longer one rounded down.
fn shortest_edge(picture: &RgbImage, size: usize) -> [usize; 2] {
    let (h, w) = dimensions(picture);
    let long = |long: usize, short: usize| size * long / short;
    if h <= w { [size, long(w, h)] } else { [long(h, w), size] }
}

/// `[H, W, 3]` in [0, 1] to `[3, H, W]` of CLIP's mean and deviation.
fn normalised(pixels: &[f32]) -> Vec<f32> {
    let channel = |c: usize| pixels.iter().skip(c).step_by(3).map(move |value| (value - MEAN[c]) / STD[c]);
    (0..3).flat_map(channel).collect()
}

/// The kernel a picture is resized with, stretched over the source when a picture shrinks (antialiasing).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filter {
    /// Triangle, one source pixel to each side.
    Bilinear,
    /// Cubic convolution with a = -1/2, two source pixels to each side.
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let x = x.abs();
        match self {
            Filter::Bilinear if x < 1.0 => 1.0 - x,
            Filter::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Filter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            _ => 0.0,
        }
    }
}

/// A value of a picture, and how a weighted sum of such is formed.
trait Sample: Copy + Default {
    type Weight: Copy;
    type Sum: Copy;
    const ZERO: Self::Sum;
    fn weight(weight: f64) -> Self::Weight;
    fn add(sum: Self::Sum, value: Self, weight: Self::Weight) -> Self::Sum;
    fn finish(sum: Self::Sum) -> Self;
}

/// Bits after the point of Pillow's weights: 32 less 8 of a value and 2 for overshoot.
const PRECISION: i32 = 22;

/// Pillow's fixed point.
impl Sample for u8 {
    type Weight = i32;
    type Sum = i32;
    const ZERO: i32 = 1 << (PRECISION - 1);

    fn weight(weight: f64) -> i32 {
        (weight * f64::from(1 << PRECISION)).round() as i32
    }

    fn add(sum: i32, value: u8, weight: i32) -> i32 {
        sum + i32::from(value) * weight
    }

    fn finish(sum: i32) -> u8 {
        (sum >> PRECISION).clamp(0, 255) as u8
    }
}

impl Sample for f32 {
    type Weight = f64;
    type Sum = f64;
    const ZERO: f64 = 0.0;

    fn weight(weight: f64) -> f64 {
        weight
    }

    fn add(sum: f64, value: f32, weight: f64) -> f64 {
        sum + f64::from(value) * weight
    }

    fn finish(sum: f64) -> f32 {
        sum as f32
    }
}

/// A line of a resized picture, and which of its values are kept: others are not computed, for those of a thin strip whose
/// short edge is enlarged are many.
struct Line {
    side: usize,
    kept: Range<usize>,
}

impl Line {
    fn whole(side: usize) -> Self {
        Self { side, kept: 0..side }
    }

    fn is_whole(&self, side: usize) -> bool {
        self.side == side && self.kept.len() == side
    }
}

/// `[H, W, 3]` at another size (height, width): rows first, then columns, as Pillow and torch do; a direction that keeps
/// its size is left alone.
fn resize<T: Sample>(pixels: &[T], (h, w): (usize, usize), [to_h, to_w]: [Line; 2], filter: Filter) -> Vec<T> {
    let width = to_w.kept.len();
    let rows = if to_w.is_whole(w) { pixels.to_vec() } else { pass(pixels, 3, &taps::<T>(filter, w, to_w), w) };
    if to_h.is_whole(h) { rows } else { pass(&rows, 3 * width, &taps::<T>(filter, h, to_h), h) }
}

/// What one value of a resized line is made of: the weights of the source's values from `first` on, of sum 1.
struct Taps<W> {
    first: usize,
    weights: Vec<W>,
}

/// The taps of a line made from `input` values (Pillow's libImaging/Resample.c, `precompute_coeffs`).
fn taps<T: Sample>(filter: Filter, input: usize, output: Line) -> Vec<Taps<T::Weight>> {
    let scale = input as f64 / output.side as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let one = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let first = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(input);
        let raw: Vec<f64> = (first..end).map(|x| filter.at((x as f64 - centre + 0.5) * (1.0 / stretch))).collect();
        let sum: f64 = raw.iter().sum();
        Taps { first, weights: raw.into_iter().map(|weight| T::weight(weight / sum)).collect() }
    };
    output.kept.map(one).collect()
}

/// `[_, input, inner]` to `[_, taps, inner]`.
fn pass<T: Sample>(pixels: &[T], inner: usize, taps: &[Taps<T::Weight>], input: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(pixels.len() / input * taps.len());
    let mut sums = vec![T::ZERO; inner];
    for lines in pixels.chunks_exact(input * inner) {
        for Taps { first, weights } in taps {
            sums.fill(T::ZERO);
            for (values, &weight) in lines[first * inner..].chunks_exact(inner).zip(weights) {
                sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum = T::add(*sum, value, weight));
            }
            out.extend(sums.iter().map(|&sum| T::finish(sum)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The middle square of what is resized as a whole; and a strip whose whole would have 600 million values.
    #[test]
    fn only_what_is_kept_is_computed() {
        let drawn =
            |w, h| RgbImage::from_fn(w, h, |x, y| image::Rgb([(x * 7 % 251) as u8, (y * 31) as u8, (x * y) as u8]));
        for (w, h) in [(300, 20), (20, 300), (24, 90), (64, 24)] {
            let picture = drawn(w, h);
            let [high, wide] = shortest_edge(&picture, 24);
            let whole = resize(picture.as_raw(), dimensions(&picture), [high, wide].map(Line::whole), Filter::Bicubic);
            let (top, left) = ((high - 24) / 2, (wide - 24) / 2);
            let row = |y: usize| &whole[3 * ((top + y) * wide + left)..][..3 * 24];
            assert!(
                resized_and_cropped(&picture, 24) == (0..24).flat_map(row).copied().collect::<Vec<_>>(),
                "{w} x {h}"
            );
        }
        let begun = std::time::Instant::now();
        assert_eq!(Preprocess::Tensor.run(&[drawn(4096, 1)], 224).unwrap().dims(), [1, 3, 224, 224]);
        assert_eq!(resized_and_cropped(&drawn(1, 4096), 224).len(), 3 * 224 * 224);
        assert!(begun.elapsed() < std::time::Duration::from_secs(5), "{:?}", begun.elapsed());
    }
}
