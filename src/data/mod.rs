//! Prompts: what they are, where they come from, and which rank samples which.

mod draw;
mod file;
pub mod geneval;
pub mod glyphs;
mod json;
mod layout;
mod lines;
mod markup;
pub mod render;
pub mod shapes;
mod table;
mod unique;

use crate::error::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;

/// What a prompt file says of a prompt, for the rewards that read it: the whole object of its line, or its row of a table
/// by the columns' names; prompt included. GenEval's: `tag`, `include`, `exclude`.
pub type Metadata = Arc<Map<String, Value>>;

/// One prompt of a prompt set. Its words are shared, not copied, by all that hold it.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Its number in the prompt set: groups are keyed by it, never by text.
    pub index: usize,
    /// What the model is told.
    pub text: Arc<str>,
    /// What guidance leads away from, where its file says so (`negative_prompt`); nothing: what the model usually does.
    pub negative: Option<Arc<str>>,
    /// What its file says of it beside the text.
    pub metadata: Option<Metadata>,
}

impl Prompt {
    /// A prompt of which nothing more is known.
    pub fn new(index: usize, text: impl Into<Arc<str>>) -> Prompt {
        Prompt { index, text: text.into(), negative: None, metadata: None }
    }

    /// What the model is told of it: its text and, where it is `guided`, what that leads away from.
    pub fn texts(&self, guided: bool) -> impl Iterator<Item = &str> {
        std::iter::once(&*self.text).chain(self.negative.as_deref().filter(|_| guided))
    }
}

/// What the prompts are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// To train on.
    Train,
    /// To evaluate on.
    Eval,
}

/// How a prompt file is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// By what the file holds: text, JSON lines, one JSON list, or a table with a header that names `prompt`.
    #[default]
    Auto,
    /// One prompt a line, as it stands.
    Text,
    /// One JSON object a line, the prompt in its field `prompt`.
    Jsonl,
}

/// Prompts in a fixed order; `prompts[i].index == i`.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptSet {
    /// The prompts. Two of them may have the same text: they are still two groups.
    pub prompts: Vec<Prompt>,
}

impl PromptSet {
    /// The prompts of a source: of an embedded task (`glyphs`: numbers of three digits, `glyphs-4`: of four, to train on
    /// every number that is not held out in every colour pair, to evaluate every held-out number in one; `shapes`:
    /// [`shapes::prompts`]); those of a file; or those of a data set's folder, `train_metadata.jsonl`, `train.jsonl` or `train.txt`, or `test` likewise.
    ///
    /// # Errors
    /// Those of [`PromptSet::from_file`], or a folder without such a file.
    pub fn load(source: &str, split: Split, format: Format) -> Result<PromptSet> {
        Ok(match (embedded(source), split) {
            (Some(Embedded::Glyphs(digits)), Split::Train) => {
                glyphs::train_prompts(digits).map(|prompt| prompt.to_string()).collect()
            }
            (Some(Embedded::Glyphs(digits)), Split::Eval) => {
                glyphs::eval_prompts(digits).map(|prompt| prompt.to_string()).collect()
            }
            (Some(Embedded::Shapes), _) => shapes::prompts(split).map(|prompt| prompt.to_string()).collect(),
            (None, _) => PromptSet::from_file(file::file_of(Path::new(source), split, format)?, format)?,
        })
    }

    /// [`PromptSet::load`] of what to train on, whatever the format.
    ///
    /// # Errors
    /// As there.
    pub fn train(source: &str) -> Result<PromptSet> {
        PromptSet::load(source, Split::Train, Format::Auto)
    }

    /// Whether a source is a prompt set of an embedded task, not a file.
    pub fn is_embedded(source: &str) -> bool {
        embedded(source).is_some()
    }

    /// [`PromptSet::load`] of what to evaluate on, whatever the format.
    ///
    /// # Errors
    /// As there.
    pub fn eval(source: &str) -> Result<PromptSet> {
        PromptSet::load(source, Split::Eval, Format::Auto)
    }

    /// Reads a prompt file, UTF-8: one prompt a line; or JSON objects with the prompt in the field `prompt`, one a line or
    /// in a list; or a list of texts; or a table with commas, semicolons or tabs whose header names a column `prompt`. An
    /// object or row becomes the prompt's metadata, its `negative_prompt` what guidance leads away from.
    ///
    /// Lines are trimmed and empty ones skipped; a byte order mark and any line ends are accepted.
    ///
    /// # Errors
    /// A file that cannot be read, is not UTF-8, is written in more than one way or in none that is clear, or has no prompt
    /// at all; the message names the file and the line.
    pub fn from_file(path: impl AsRef<Path>, format: Format) -> Result<PromptSet> {
        Ok(PromptSet { prompts: file::read_prompts(path.as_ref(), format)? })
    }

    /// The prompts' texts.
    pub fn texts(&self) -> Vec<&str> {
        self.prompts.iter().map(|prompt| &*prompt.text).collect()
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

/// A prompt set that is part of the program.
enum Embedded {
    /// Numbers so long.
    Glyphs(glyphs::Digits),
    /// Coloured shapes.
    Shapes,
}

/// The embedded prompt sets by name.
fn embedded(source: &str) -> Option<Embedded> {
    match source {
        "glyphs" => Some(Embedded::Glyphs(glyphs::Digits::Three)),
        "glyphs-4" => Some(Embedded::Glyphs(glyphs::Digits::Four)),
        "shapes" => Some(Embedded::Shapes),
        _ => None,
    }
}

/// Numbers the texts in the order they come.
impl FromIterator<String> for PromptSet {
    fn from_iter<I: IntoIterator<Item = String>>(texts: I) -> PromptSet {
        let prompts = texts.into_iter().enumerate().map(|(index, text)| Prompt::new(index, text)).collect();
        PromptSet { prompts }
    }
}

#[cfg(test)]
mod tests;
