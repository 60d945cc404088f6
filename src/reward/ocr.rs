//! The OCR reward: how much of the quoted text a text recogniser reads in the picture.
//!
//! The recogniser is PP-OCRv4 (mobile) with its classes cut to ASCII, run by `rten`; see `assets/ocr/NOTICE`. Its
//! input is normalised BGR `[1, 3, 48, W]`, its output class probabilities `[1, W / 8, 96]`.

use super::{Reward, check_count, failed, to_rgb8};
use crate::{data::Prompt, error::Result};
use candle_core::Tensor;
use image::{
    RgbImage,
    imageops::{FilterType, resize},
};
use rayon::prelude::*;
use rten::{Model, RunOptions, ThreadPool, ValueView, ctc::CtcDecoder};
use std::sync::Arc;

static MODEL: &[u8] = include_bytes!("../../assets/ocr/ppocrv4_rec_ascii.onnx");
/// One character a line, in the order of the classes from 1; class 0 is the CTC blank.
static KEYS: &str = include_str!("../../assets/ocr/ppocrv4_rec_ascii.keys.txt");

const NAME: &str = "ocr";
/// The height the recogniser was trained with, in pixels.
const HEIGHT: u32 = 48;
/// Pixels a time step of the recogniser is wide: widths are multiples of it.
const STEP: u32 = 8;

/// Reads the text in pictures, and rewards the right one.
pub struct Ocr {
    model: Model,
    /// The characters of the classes from 1.
    alphabet: String,
    pool: Arc<ThreadPool>,
}

impl Ocr {
    /// Loads the embedded recogniser, to run on `threads` threads of its own (at least one).
    ///
    /// # Errors
    /// [`Error::Reward`] if the model does not load, which would be a fault of the build.
    pub fn new(threads: usize) -> Result<Ocr> {
        let model = Model::load_static_slice(MODEL).map_err(failed(NAME))?;
        let pool = Arc::new(ThreadPool::with_num_threads(threads.max(1)));
        Ok(Ocr { model, alphabet: KEYS.lines().collect(), pool })
    }

    /// The text in each image, in upper and lower case as read; empty where there is none.
    ///
    /// `images` is `[B, 3, H, W]` f32 in [0, 1], RGB, one line of text each. Images go through the recogniser one by
    /// one, in parallel over the threads, so that a text depends on nothing but its image; larger batches are no
    /// faster (15 to 17 ms an image and core for 1, 4, 8 and 16).
    ///
    /// # Errors
    /// As [`to_rgb8`]; [`Error::Reward`] if the recogniser fails.
    pub fn read(&self, images: &Tensor) -> Result<Vec<String>> {
        let pictures = to_rgb8(images)?;
        self.pool.run(|| pictures.par_iter().map(|picture| self.read_one(picture)).collect())
    }

    fn read_one(&self, picture: &RgbImage) -> Result<String> {
        let (input, width) = preprocess(picture);
        let probabilities = self.probabilities(&input, width)?;
        let classes = 1 + self.alphabet.len();
        let steps =
            ValueView::from_shape([probabilities.len() / classes, classes], &probabilities).map_err(failed(NAME))?;
        // Greedy: the likeliest class of each step, repeats merged, blanks dropped.
        let labels = CtcDecoder::new().decode_greedy(steps.try_into().map_err(failed(NAME))?);
        Ok(labels.to_string(&self.alphabet))
    }

    /// The recogniser itself: class probabilities `[W / 8, 96]` for one normalised BGR picture `[3, 48, W]`.
    ///
    /// # Errors
    /// [`Error::Reward`] if the picture is not of that size or the recogniser fails.
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
        let texts = self.read(images)?;
        check_count(self.name(), texts.len(), prompts)?;
        Ok(prompts.iter().zip(&texts).map(|(prompt, text)| edit_reward(&prompt.text, text)).collect())
    }
}

/// `1 - min(d, n) / n` for the edit distance d between what was read and the text between the prompt's first double
/// quotes, n characters long; upper and lower case are the same and spaces do not count. `None` without such a text.
pub fn edit_reward(prompt: &str, read: &str) -> Option<f64> {
    let (_, rest) = prompt.split_once('"')?;
    let (quoted, _) = rest.split_once('"')?;
    let (want, read) = (normal(quoted), normal(read));
    let length = want.chars().count();
    if length == 0 {
        return None;
    }
    let distance = strsim::levenshtein(&want, &read).min(length);
    Some(1.0 - distance as f64 / length as f64)
}

fn normal(text: &str) -> String {
    text.split_whitespace().collect::<String>().to_lowercase()
}

/// Normalised BGR `[3, 48, W]` and W: resized bilinearly to 48 rows with its aspect kept to the nearest whole step.
fn preprocess(picture: &RgbImage) -> (Vec<f32>, usize) {
    let steps = f64::from(picture.width() * HEIGHT) / f64::from(picture.height() * STEP);
    let width = STEP * (steps.round() as u32).max(1);
    let resized = resize(picture, width, HEIGHT, FilterType::Triangle);
    let channel = |c: usize| resized.pixels().map(move |pixel| (f32::from(pixel[c]) / 255.0 - 0.5) / 0.5);
    ([2, 1, 0].into_iter().flat_map(channel).collect(), width as usize)
}
