//! The OCR reward: how much of the quoted text a text recogniser reads in the picture.
//!
//! Small pictures are one line of text. In large ones a detector finds the lines; its model is the user's to fetch
//! (`launch/fetch-ocr.sh`).
//!
//! The recogniser is PP-OCRv4 (mobile) with its classes cut to ASCII, run by `rten`; see `assets/ocr/NOTICE`. Its
//! input is normalised BGR `[1, 3, 48, W]`, its output class probabilities `[1, W / 8, 96]`.

mod boxes;
mod detect;
mod target;

pub use target::{edit_reward, found_reward, target};

use super::config::is_there;
use super::{Fit, Loader, Reward, RewardSpec, check_count, failed, to_rgb8};
use crate::{data::Prompt, error::Result};
use candle_core::Tensor;
use image::{
    RgbImage,
    imageops::{FilterType, resize},
};
use rayon::prelude::*;
use rten::{
    Model, RunOptions, ThreadPool, ValueView,
    ctc::{CtcDecoder, DecodeStep},
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use detect::Detector;

static MODEL: &[u8] = include_bytes!("../../../assets/ocr/ppocrv4_rec_ascii.onnx");
/// One character a line, in the order of the classes from 1; class 0 is the CTC blank.
static KEYS: &str = include_str!("../../../assets/ocr/ppocrv4_rec_ascii.keys.txt");

const NAME: &str = "ocr";
/// The height the recogniser was trained with, in pixels.
const HEIGHT: u32 = 48;
/// Pixels a time step of the recogniser is wide: widths are multiples of it.
const STEP: u32 = 8;
/// The widest line that the recogniser sees, in pixels; a longer one is squeezed, as PaddleX does (`MAX_IMG_W`): time and
/// memory grow with the square of it.
const WIDEST: u32 = 3200;
/// A found line counts as text if its characters are as likely as this on average (PaddleOCR's `drop_score`).
const LEAST_CONFIDENCE: f32 = 0.5;

/// The keys of `[[reward]]` with `name = "ocr"`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OcrConfig {
    /// Finds text in large pictures (launch/fetch-ocr.sh); left out: the whole picture is one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detector: Option<PathBuf>,
}

impl RewardSpec for OcrConfig {
    fn check_files(&self) -> std::result::Result<(), String> {
        let there = |detector| is_there("detector", detector, "launch/fetch-ocr.sh fetches it");
        self.detector.as_deref().map_or(Ok(()), there)
    }

    fn files(&self) -> &'static [&'static str] {
        &["detector"]
    }

    fn fit(&self, prompt: &Prompt) -> Fit {
        fit(prompt)
    }

    fn build(&self, loader: &Loader) -> Result<Box<dyn Reward>> {
        Ok(Box::new(match &self.detector {
            None => Ocr::new(loader.threads())?,
            Some(detector) => Ocr::with_detector(loader.threads(), detector)?,
        }))
    }
}

/// Reads the text in pictures, and rewards the right one.
pub struct Ocr {
    model: Model,
    /// The characters of the classes from 1.
    alphabet: String,
    pool: Arc<ThreadPool>,
    detector: Option<Detector>,
}

impl Ocr {
    /// Loads the embedded recogniser, to run on `threads` threads of its own (at least one).
    ///
    /// # Errors
    /// [`crate::Error::Reward`] if the model does not load, which would be a fault of the build.
    pub fn new(threads: usize) -> Result<Ocr> {
        let model = Model::load_static_slice(MODEL).map_err(failed(NAME))?;
        let pool = Arc::new(ThreadPool::with_num_threads(threads.max(1)));
        Ok(Ocr { model, alphabet: KEYS.lines().collect(), pool, detector: None })
    }

    /// The same for pictures with lines of text anywhere, which the model at `detector` finds.
    ///
    /// # Errors
    /// As [`Ocr::new`]; [`Error::File`](crate::Error::File) if the detector's model does not load.
    pub fn with_detector(threads: usize, detector: &Path) -> Result<Ocr> {
        let ocr = Ocr::new(threads)?;
        let detector = Detector::load(detector, ocr.pool.clone())?;
        Ok(Ocr { detector: Some(detector), ..ocr })
    }

    /// The text in each image, in upper and lower case as read; empty where there is none. Lines that a detector found
    /// follow each other without a space.
    ///
    /// `images` is `[B, 3, H, W]` f32 in [0, 1], RGB; without a detector one line of text each. Images are read one by
    /// one, in parallel over the threads, so that a text depends on nothing but its image; larger batches are no
    /// faster (15 to 17 ms an image and core for 1, 4, 8 and 16).
    ///
    /// # Errors
    /// As [`to_rgb8`]; [`Error::Reward`](crate::Error::Reward) if a model fails.
    pub fn read(&self, images: &Tensor) -> Result<Vec<String>> {
        let pictures = to_rgb8(images)?;
        self.pool.run(|| pictures.par_iter().map(|picture| self.read_one(picture)).collect())
    }

    fn read_one(&self, picture: &RgbImage) -> Result<String> {
        let Some(detector) = &self.detector else { return Ok(self.read_line(picture)?.0) };
        let mut text = String::new();
        for line in detector.lines(picture).map_err(failed(NAME))? {
            let (read, confidence) = self.read_line(&line)?;
            if confidence >= LEAST_CONFIDENCE {
                text.push_str(&read);
            }
        }
        Ok(text)
    }

    /// The text of a picture of one line, and the mean probability of its characters.
    fn read_line(&self, picture: &RgbImage) -> Result<(String, f32)> {
        let (input, width) = preprocess(picture);
        let probabilities = self.probabilities(&input, width)?;
        let classes = 1 + self.alphabet.len();
        let steps =
            ValueView::from_shape([probabilities.len() / classes, classes], &probabilities).map_err(failed(NAME))?;
        // Greedy: the likeliest class of each step, repeats merged, blanks dropped.
        let labels = CtcDecoder::new().decode_greedy(steps.try_into().map_err(failed(NAME))?);
        let likely = |step: &DecodeStep| probabilities[step.pos as usize * classes + step.label as usize];
        let sum: f32 = labels.steps().iter().map(likely).sum();
        Ok((labels.to_string(&self.alphabet), sum / labels.steps().len().max(1) as f32))
    }

    /// The recogniser itself: class probabilities `[W / 8, 96]` for one normalised BGR picture `[3, 48, W]`.
    ///
    /// # Errors
    /// [`crate::Error::Reward`] if the picture is not of that size or the recogniser fails.
    pub fn probabilities(&self, input: &[f32], width: usize) -> Result<Vec<f32>> {
        let input = ValueView::from_shape([1, 3, HEIGHT as usize, width], input).map_err(failed(NAME))?;
        let options = RunOptions::default().with_thread_pool(Some(self.pool.clone()));
        let output = self.model.run_one(input.into(), Some(options)).map_err(failed(NAME))?;
        let (_, probabilities) = output.into_shape_vec::<f32, 3>().map_err(failed(NAME))?; // [1, W / 8, 96]
        Ok(probabilities)
    }
}

impl Reward for Ocr {
    fn name(&self) -> &str {
        NAME
    }

    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
        let pictures = to_rgb8(images)?;
        check_count(self.name(), pictures.len(), prompts)?;
        let score = |(picture, prompt): (&RgbImage, &Prompt)| -> Result<Option<f64>> {
            if target(&prompt.text).is_none() {
                return Ok(None); // nothing to read for
            }
            let read = self.read_one(picture)?;
            Ok(match self.detector {
                None => edit_reward(&prompt.text, &read),
                Some(_) => found_reward(&prompt.text, &read),
            })
        };
        self.pool.run(|| pictures.par_iter().zip(prompts).map(score).collect())
    }
}

/// What can be said of a prompt before there is a picture: whether it has a target, and one that can be read.
pub(super) fn fit(prompt: &Prompt) -> Fit {
    let Some(target) = target(&prompt.text) else {
        return Fit::No("it has no text in double quotes, or a quote without its other half");
    };
    let unwritable = target::unwritable(&target);
    if unwritable.is_empty() {
        Fit::Yes
    } else {
        Fit::Partly("its recogniser cannot write some characters", unwritable)
    }
}

/// Normalised BGR `[3, 48, W]` and W: resized bilinearly to 48 rows with its aspect kept to the nearest whole step, up to
/// [`WIDEST`].
fn preprocess(picture: &RgbImage) -> (Vec<f32>, usize) {
    let steps = f64::from(picture.width()) * f64::from(HEIGHT) / (f64::from(picture.height()) * f64::from(STEP));
    let width = STEP * (steps.round() as u32).clamp(1, WIDEST / STEP);
    let resized = resize(picture, width, HEIGHT, FilterType::Triangle);
    let channel = |c: usize| resized.pixels().map(move |pixel| (f32::from(pixel[c]) / 255.0 - 0.5) / 0.5);
    ([2, 1, 0].into_iter().flat_map(channel).collect(), width as usize)
}
