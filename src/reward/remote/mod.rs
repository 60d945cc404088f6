//! Rewards that a server computes: models in other languages, on other machines, or shared by many ranks.

mod client;
mod config;
mod wire;

pub use client::longest_s;
pub use config::RemoteConfig;
pub use wire::WireFormat;

use super::{Requests, Reward, ScoreResult, check_count, failed, to_rgb8};
use crate::advantage::Score;
use crate::data::Prompt;
use crate::error::{Error, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candle_core::Tensor;
use client::Client;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder, RgbImage};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use wire::{Answer, Item};

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
    pub fn new(config: &RemoteConfig) -> Result<Self> {
        let RemoteConfig { url, reward, format, retries, batch, connections, on_failure, .. } = config;
        let token = config.token().map_err(|message| Error::Usage(format!("reward {reward}: {message}")))?;
        let timeout = Duration::from_secs(config.timeout_s);
        let client = Client::new(url, reward, *format, (timeout, *retries, *connections), token);
        Ok(Self { client, batch: *batch, connections: *connections, on_failure: *on_failure })
    }

    /// Asks for the pictures, one request after another; returns the answers, and whether a request failed for good.
    ///
    /// After one that did, no other is begun: a server that is gone costs the time of one request. Nor is one begun after an
    /// image without a score that ends the run.
    fn ask(&self, pictures: &[RgbImage], prompts: &[Prompt]) -> Result<(Vec<Answer>, bool)> {
        let all = pictures.len();
        let mut answers = Vec::with_capacity(all);
        for (pictures, prompts) in pictures.chunks(self.batch).zip(prompts.chunks(self.batch)) {
            match self.batch(pictures, prompts) {
                Ok(answer) => {
                    let ends =
                        self.on_failure == OnFailure::Stop && answer.iter().any(|a| matches!(a, Answer::Failed(_)));
                    answers.extend(answer);
                    if ends {
                        break;
                    }
                }
                Err(error) if self.on_failure == OnFailure::Stop => return Err(error),
                Err(error) => {
                    answers.resize(all, Answer::Failed(error.to_string()));
                    return Ok((answers, true));
                }
            }
        }
        Ok((answers, false))
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
        let scores = self.try_score(images, prompts)?.scores;
        let failed = scores.iter().filter(|&&score| score == Score::Failed).count();
        match scores.iter().position(|&score| score == Score::Failed) {
            None => Ok(scores.into_iter().map(Score::value).collect()),
            Some(image) => Err(self.client.error(format!("{failed} images have no score, image {image} first"))),
        }
    }

    fn try_score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<ScoreResult> {
        let pictures = to_rgb8(images)?;
        check_count(self.name(), pictures.len(), prompts)?;
        let (answers, unavailable) = self.ask(&pictures, prompts)?;
        let mut scores = Vec::with_capacity(answers.len());
        for (image, answer) in answers.into_iter().enumerate() {
            scores.push(match answer {
                Answer::Score(score) => Score::Value(score),
                Answer::NotApplicable => Score::NotApplicable,
                Answer::Failed(message) if self.on_failure == OnFailure::Stop => {
                    let Prompt { index, text, .. } = &prompts[image];
                    return Err(self.client.error(format!("prompt {index} {text:?}: {message}")));
                }
                Answer::Failed(message) => {
                    if !scores.contains(&Score::Failed) {
                        tracing::warn!("reward {}: {}: images are left out: {message}", self.name(), self.client.url);
                    }
                    Score::Failed
                }
            });
        }
        Ok(ScoreResult { scores, unavailable })
    }

    fn requests(&self) -> Option<Requests> {
        Some(Requests { images: self.batch, at_once: self.connections })
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
