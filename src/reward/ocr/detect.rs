//! Where text stands in a picture: PP-OCRv4's detector, run by `rten`, and pictures of the lines that it finds.

use super::boxes::{TextBox, text_boxes};
use crate::error::{Error, Result};
use crate::fs;
use image::imageops::{FilterType, resize};
use image::{Rgb, RgbImage};
use rten::{Model, RunOptions, ThreadPool, ValueView};
use std::path::Path;
use std::sync::Arc;

/// The longest side that the detector sees; larger pictures are made smaller.
const LONGEST: u32 = 960;
/// Sides are multiples of this.
const STEP: u32 = 32;
/// Mean and deviation of the channels, in the order BGR, as the detector was trained (PaddleOCR's `NormalizeImage`).
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Finds lines of text.
pub(super) struct Detector {
    model: Model,
    pool: Arc<ThreadPool>,
}

impl Detector {
    /// Loads `ch_PP-OCRv4_det_infer.onnx`.
    ///
    /// # Errors
    /// [`Error::File`]: it is missing or no such model.
    pub fn load(path: &Path, pool: Arc<ThreadPool>) -> Result<Self> {
        let error = |message: String| Error::File { path: path.to_path_buf(), message };
        let bytes = fs::read(path)?;
        let model =
            Model::load(bytes).map_err(|e| error(format!("is no model ({e}); fetch it with launch/fetch-ocr.sh")))?;
        Ok(Self { model, pool })
    }

    /// Pictures of the lines of text, upright, in reading order.
    pub fn lines(&self, picture: &RgbImage) -> std::result::Result<Vec<RgbImage>, String> {
        let (width, height) = picture.dimensions();
        let scale = f64::from(LONGEST) / f64::from(width.max(height).max(LONGEST));
        let side = |side: u32| ((f64::from(side) * scale / f64::from(STEP)).round_ties_even() as u32).max(1) * STEP;
        let (w, h) = (side(width), side(height));
        let resized =
            if (w, h) == (width, height) { picture.clone() } else { resize(picture, w, h, FilterType::Triangle) };
        let map = self.map(&resized)?; // [H, W]
        let to_picture = [f64::from(width) / f64::from(w), f64::from(height) / f64::from(h)];
        Ok(text_boxes(&map, w as usize).iter().map(|found| cut_out(picture, found, to_picture)).collect())
    }

    /// The probability of text at each pixel, `[H, W]`; sides are multiples of 32.
    fn map(&self, picture: &RgbImage) -> std::result::Result<Vec<f32>, String> {
        let channel = |(i, c): (usize, usize)| {
            picture.pixels().map(move |pixel| (f32::from(pixel[c]) / 255.0 - MEAN[i]) / STD[i])
        };
        let input: Vec<f32> = [2, 1, 0].into_iter().enumerate().flat_map(channel).collect();
        let shape = [1, 3, picture.height() as usize, picture.width() as usize];
        let input = ValueView::from_shape(shape, &input).map_err(|e| e.to_string())?;
        let options = RunOptions::default().with_thread_pool(Some(self.pool.clone()));
        let output = self.model.run_one(input.into(), Some(options)).map_err(|e| e.to_string())?;
        let (_, map) = output.into_shape_vec::<f32, 4>().map_err(|e| e.to_string())?; // [1, 1, H, W]
        Ok(map)
    }
}

/// The picture in a box, its text upright; the box is in pixels that are `scale` pixels of the picture.
fn cut_out(picture: &RgbImage, found: &TextBox, scale: [f64; 2]) -> RgbImage {
    let length = |axis: [f64; 2]| (axis[0] * scale[0]).hypot(axis[1] * scale[1]);
    let [ax, ay] = found.along;
    let width = (found.size[0] * length([ax, ay])).round().max(1.0) as u32;
    let height = (found.size[1] * length([-ay, ax])).round().max(1.0) as u32;
    RgbImage::from_fn(width, height, |x, y| {
        let place = found.at((f64::from(x) + 0.5) / f64::from(width), (f64::from(y) + 0.5) / f64::from(height));
        sample(picture, place[0] * scale[0], place[1] * scale[1])
    })
}

/// Between four pixels; beyond the edge its pixels go on.
fn sample(picture: &RgbImage, x: f64, y: f64) -> Rgb<u8> {
    let axis = |value: f64, length: u32| {
        let value = value.clamp(0.0, f64::from(length - 1));
        let low = value.floor();
        (low as u32, (low as u32 + 1).min(length - 1), value - low)
    };
    let (left, right, u) = axis(x, picture.width());
    let (top, bottom, v) = axis(y, picture.height());
    let at = |x: u32, y: u32, c: usize| f64::from(picture.get_pixel(x, y)[c]);
    Rgb([0, 1, 2].map(|c| {
        let upper = at(left, top, c) * (1.0 - u) + at(right, top, c) * u;
        let lower = at(left, bottom, c) * (1.0 - u) + at(right, bottom, c) * u;
        (upper * (1.0 - v) + lower * v).round() as u8
    }))
}
