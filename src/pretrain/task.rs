//! The tasks whose pictures the program draws itself.

use crate::data::glyphs::GlyphPrompt;
use crate::data::render::{Style, render};
use crate::data::shapes::{self, ShapesPrompt};
use crate::error::Result;
use crate::pipeline::Kind;
use crate::reward::RewardConfig;
use serde::{Deserialize, Serialize};

/// What a base model is pretrained for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Legible text.
    Glyphs,
    /// Coloured shapes.
    Shapes,
}

impl Task {
    /// The name of its base model and of its prompts.
    pub fn name(self) -> &'static str {
        match self {
            Task::Glyphs => "glyphs",
            Task::Shapes => "shapes",
        }
    }

    /// Its base model.
    pub fn kind(self) -> Kind {
        Kind::named(self.name()).unwrap_or_default()
    }

    /// What the looks are scored by; the first says when to stop.
    pub fn rewards(self) -> Vec<RewardConfig> {
        self.kind().eval_rewards().iter().copied().map(RewardConfig::new).collect()
    }

    /// Whether it can draw a picture with a fact wrong.
    pub fn has_facts(self) -> bool {
        self == Task::Shapes
    }

    /// Draws a prompt in the style of a (random) number, RGB `[3, H, W]` in [0, 1]; with `wrong`, another such number, one
    /// fact of the prompt is drawn wrong, if the task has facts.
    ///
    /// # Errors
    /// The prompt is not of the task.
    pub fn draw(self, prompt: &str, style: u64, wrong: Option<u64>) -> Result<Vec<f32>> {
        match self {
            Task::Glyphs => Ok(render(&GlyphPrompt::parse(prompt)?, &Style::from_bits(style))),
            Task::Shapes => {
                let prompt = ShapesPrompt::parse(prompt)?;
                let shown = wrong.map_or(prompt, |wrong| prompt.with_a_wrong_fact(wrong));
                Ok(shapes::render(&shown, style))
            }
        }
    }
}
