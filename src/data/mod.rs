//! Prompts: what they are, where they come from, and which rank samples which.

mod draw;
mod file;
pub mod glyphs;
pub mod render;

use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One prompt of a prompt set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// Its number in the prompt set: groups are keyed by it, never by text.
    pub index: usize,
    /// What the model is told.
    pub text: String,
}

/// Prompts in a fixed order; `prompts[i].index == i`.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptSet {
    /// The prompts. Two of them may have the same text: they are still two groups.
    pub prompts: Vec<Prompt>,
}

impl PromptSet {
    /// The prompts to train on: of the embedded task (`glyphs`: numbers of three digits, `glyphs-4`: of four), every
    /// number that is not held out in every colour pair; or those of a file.
    ///
    /// # Errors
    /// Those of [`PromptSet::from_file`].
    pub fn train(source: &str) -> Result<PromptSet> {
        Ok(match embedded(source) {
            Some(digits) => glyphs::train_prompts(digits).map(|prompt| prompt.to_string()).collect(),
            None => PromptSet::from_file(source)?,
        })
    }

    /// Whether a source is a prompt set of the embedded task, not a file.
    pub fn is_embedded(source: &str) -> bool {
        embedded(source).is_some()
    }

    /// The prompts to evaluate: every held-out number in one colour pair; or those of a file.
    ///
    /// # Errors
    /// Those of [`PromptSet::from_file`].
    pub fn eval(source: &str) -> Result<PromptSet> {
        Ok(match embedded(source) {
            Some(digits) => glyphs::eval_prompts(digits).map(|prompt| prompt.to_string()).collect(),
            None => PromptSet::from_file(source)?,
        })
    }

    /// Reads a prompt file: UTF-8, one prompt a line, or, when its name ends in `.jsonl`, one JSON object a line with
    /// the prompt in the field `prompt` (other fields are left alone).
    ///
    /// Lines are trimmed and empty ones skipped; a byte order mark and CRLF line ends are accepted.
    ///
    /// # Errors
    /// A file that cannot be read, is not UTF-8, has a line that is not such an object, or has no prompt at all; the
    /// message names the file and the line.
    pub fn from_file(path: impl AsRef<Path>) -> Result<PromptSet> {
        Ok(file::read_prompts(path.as_ref())?.into_iter().collect())
    }

    /// How many prompts there are.
    pub fn len(&self) -> usize {
        self.prompts.len()
    }

    /// Whether there is no prompt.
    pub fn is_empty(&self) -> bool {
        self.prompts.is_empty()
    }
}

/// The embedded prompt sets by name.
fn embedded(source: &str) -> Option<glyphs::Digits> {
    match source {
        "glyphs" => Some(glyphs::Digits::Three),
        "glyphs-4" => Some(glyphs::Digits::Four),
        _ => None,
    }
}

/// Numbers the texts in the order they come.
impl FromIterator<String> for PromptSet {
    fn from_iter<I: IntoIterator<Item = String>>(texts: I) -> PromptSet {
        let prompts = texts.into_iter().enumerate().map(|(index, text)| Prompt { index, text }).collect();
        PromptSet { prompts }
    }
}
