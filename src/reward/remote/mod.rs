//! Rewards that a server computes: models in other languages, on other machines, or shared by many ranks.

mod client;
mod wire;

pub use client::longest_s;
pub use wire::WireFormat;

use super::{Attempt, Reward, RewardConfig, check_count, failed, to_rgb8};
use crate::data::Prompt;
use crate::error::{Error, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candle_core::Tensor;
use client::Client;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder, RgbImage};
use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use wire::{Answer, Item};

/// Seconds that a request may take, and how often it is tried again, unless the configuration says so.
pub const TIMEOUT_S: u64 = 60;
/// As [`TIMEOUT_S`].
pub const RETRIES: u32 = 3;
const BATCH: usize = 16;
const CONNECTIONS: usize = 4;

/// What becomes of the run when a score cannot be had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// It stops, with a checkpoint.
    #[default]
    Stop,
    /// The groups of the images are left out of the iteration.
    Drop,
}

/// A reward that a server computes.
#[derive(Debug)]
pub struct Remote {
    client: Client,
    batch: usize,
    connections: usize,
    on_failure: OnFailure,
}

impl Remote {
    /// The client of a checked configuration; nothing is sent yet.
    ///
    /// # Errors
    /// [`Error::Usage`]: the variable that should hold the token is not set.
    pub fn new(config: &RewardConfig) -> Result<Self> {
        let token = config.token_env.as_ref().map(|variable| {
            std::env::var(variable).map_err(|_| {
                let message = format!("token_env = {variable:?}: there is no such variable; export it with the token");
                Error::Usage(format!("reward {}: {message}", config.label()))
            })
        });
        let connections = config.connections.unwrap_or(CONNECTIONS);
        let timeout = Duration::from_secs(config.timeout_s.unwrap_or(TIMEOUT_S));
        let client = Client::new(
            config.url.as_deref().unwrap_or_default(),
            config.label(),
            config.format.unwrap_or(WireFormat::Flowrl),
            (timeout, config.retries.unwrap_or(RETRIES), connections),
            token.transpose()?,
        );
        let on_failure = config.on_failure.unwrap_or_default();
        Ok(Self { client, batch: config.batch.unwrap_or(BATCH), connections, on_failure })
    }

    /// What the server says of each image. Batches go out over a few connections at once. After one that failed for good
    /// no other is begun: a server that is gone costs one request's time, not every batch's.
    fn ask(&self, pictures: &[RgbImage], prompts: &[Prompt]) -> Result<Vec<Answer>> {
        let batches: Vec<_> = pictures.chunks(self.batch).zip(prompts.chunks(self.batch)).collect();
        let (next, broken) = (AtomicUsize::new(0), AtomicBool::new(false));
        let answers: Mutex<Vec<Option<Result<Vec<Answer>>>>> = Mutex::new((0..batches.len()).map(|_| None).collect());
        let work = || {
            while !broken.load(Ordering::SeqCst) {
                let i = next.fetch_add(1, Ordering::SeqCst);
                let Some(&(pictures, prompts)) = batches.get(i) else { return };
                let answer = self.batch(pictures, prompts);
                if answer.is_err() {
                    broken.store(true, Ordering::SeqCst);
                }
                answers.lock().unwrap_or_else(|poisoned| poisoned.into_inner())[i] = Some(answer);
            }
        };
        std::thread::scope(|scope| {
            (0..self.connections.min(batches.len())).for_each(|_| drop(scope.spawn(work)));
        });
        let answers = answers.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        let first = answers.iter().flatten().find_map(|answer| answer.as_ref().err().map(ToString::to_string));
        let mut all = Vec::with_capacity(pictures.len());
        for (answer, (pictures, _)) in answers.into_iter().zip(&batches) {
            match (answer, &first) {
                (Some(Ok(answer)), _) => all.extend(answer),
                (Some(Err(error)), _) if self.on_failure == OnFailure::Stop => return Err(error),
                (_, first) => {
                    let message = first.clone().unwrap_or_default();
                    all.extend(pictures.iter().map(|_| Answer::Failed(message.clone())));
                }
            }
        }
        Ok(all)
    }

    fn batch(&self, pictures: &[RgbImage], prompts: &[Prompt]) -> Result<Vec<Answer>> {
        let item = |(picture, prompt)| -> Result<Item> {
            Ok(Item { prompt, image: STANDARD.encode(png(picture).map_err(failed(self.name()))?) })
        };
        let items = pictures.iter().zip(prompts).map(item).collect::<Result<Vec<_>>>()?;
        self.client.answers(&items).map_err(|message| self.client.error(message))
    }
}

impl Reward for Remote {
    fn name(&self) -> &str {
        &self.client.reward
    }

    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
        let Attempt { scores, failed } = self.attempt(images, prompts)?;
        match failed.first() {
            None => Ok(scores),
            Some(image) => {
                Err(self.client.error(format!("{} images have no score, image {image} first", failed.len())))
            }
        }
    }

    fn attempt(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Attempt> {
        let pictures = to_rgb8(images)?;
        check_count(self.name(), pictures.len(), prompts)?;
        let mut attempt = Attempt { scores: Vec::with_capacity(pictures.len()), failed: Vec::new() };
        for (image, answer) in self.ask(&pictures, prompts)?.into_iter().enumerate() {
            attempt.scores.push(match answer {
                Answer::Score(score) => Some(score),
                Answer::NotApplicable => None,
                Answer::Failed(message) if self.on_failure == OnFailure::Stop => {
                    let prompt = &prompts[image];
                    let place = format!("image {image}, prompt {} {:?}", prompt.index, prompt.text);
                    return Err(self.client.error(format!("{place}: {message}")));
                }
                Answer::Failed(message) => {
                    if attempt.failed.is_empty() {
                        tracing::warn!("reward {}: {}: images are left out: {message}", self.name(), self.client.url);
                    }
                    attempt.failed.push(image);
                    None
                }
            });
        }
        Ok(attempt)
    }

    fn ready(&self) -> Result<()> {
        self.client.health()
    }
}

/// The picture as a PNG file, quickly.
fn png(picture: &RgbImage) -> image::ImageResult<Vec<u8>> {
    let mut file = Vec::new();
    let encoder = PngEncoder::new_with_quality(&mut file, CompressionType::Fast, FilterType::Adaptive);
    encoder.write_image(picture, picture.width(), picture.height(), ExtendedColorType::Rgb8)?;
    Ok(file)
}
