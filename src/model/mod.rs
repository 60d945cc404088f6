//! Models as lists of stages on differentiable operations.
//!
//! A stage is a pure function of its parameters and inputs, so that the engine can run it again when gradients are
//! wanted, with its parameters gathered for just that long.

mod bounds;
pub mod clip;
pub mod files;
mod frozen;
pub mod glyphs;
mod linear;
pub mod mmdit;
mod patch;
pub mod random;
pub mod shapes;
mod starting;
pub mod text;
mod time;
pub mod vae;

pub use linear::Linear;
pub use starting::StartingParams;
pub use time::TimeEmbedding;

use crate::error::Result;
use crate::params::{Spec, StageParams};
use candle_core::Tensor;

/// One part of a model: the stem, a block or the head.
pub trait Stage: Send + Sync {
    /// The parameters, in the order in which [`StageParams`] holds them.
    fn specs(&self) -> &[Spec];
    /// Outputs for the inputs: the next stage's inputs. An input that goes through unchanged is the same tensor.
    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>>;
    /// Outputs whose gradients alone are wanted: they have those of [`Stage::forward`], but what it would form for their
    /// values only may be left out.
    fn graph(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.forward(params, inputs)
    }
}

/// A velocity model: stem, blocks, head.
///
/// The stem's inputs are `[x_t, t, conditioning..]` with x_t `[B, C, H, W]` and t `[B]` in [0, 1]; the head's only output
/// is the velocity `[B, C, H, W]`.
pub struct Model {
    /// The stages in the order in which they run.
    pub stages: Vec<Box<dyn Stage>>,
    /// (C, H, W) of a latent.
    pub latent: (usize, usize, usize),
}

impl Model {
    /// The parameters of every stage.
    pub fn specs(&self) -> Vec<&[Spec]> {
        self.stages.iter().map(|s| s.specs()).collect()
    }
}
