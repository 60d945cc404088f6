//! Prompts: what they are, where they come from, and which rank samples which.

mod glyphs;

use serde::{Deserialize, Serialize};

/// One prompt of a prompt set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// Its number in the prompt set: groups are keyed by it, never by text.
    pub index: usize,
    /// What the model is told.
    pub text: String,
}
