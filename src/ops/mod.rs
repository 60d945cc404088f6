//! Differentiable operations that candle lacks or differentiates slowly.
//!
//! candle's own fused softmax and norms have no backward and cut the gradient without an error, and its rules form
//! the gradient of frozen operands too. Each operation here is one pass forward and one back, keeps little but its
//! inputs, and forms only the gradients that are asked for. Tests compare each with the composed form and with finite
//! differences in f64. Only frozen parts of a model convolve and normalise by groups: these two have no derivative and
//! refuse an input that wants one.

mod activation;
mod attention;
mod bf16x3;
mod convolution;
#[cfg(feature = "cuda")]
mod cuda;
mod deviation;
mod feed_forward;
mod float;
mod group_norm;
mod kernel;
mod linear;
mod linear_gelu;
mod lora;
mod norm;
mod op;
mod residual;
mod seed;
mod shape;
mod tape;
mod time;
mod walk;

pub use activation::{gelu, silu};
pub use attention::attention;
pub use convolution::convolution;
pub use deviation::deviations;
pub use feed_forward::feed_forward;
pub use group_norm::group_norm;
pub use linear::{linear, linear_for};
pub use linear_gelu::linear_gelu;
pub use lora::lora;
pub use norm::{layer_norm_modulate, rms_norm, rms_norm_joined};
pub use residual::gated_residual;
pub use seed::seed;
pub use shape::{chunk, join, reshape, split};
pub use tape::{Tape, recorded};
pub use time::time_features;
pub use walk::Walk;

/// What somebody will look at of an operation's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Its value, and its gradients if an input is tracked.
    Value,
    /// Its gradients alone: the value is zeros, which saves forming it. For what ends a stage that runs again.
    Gradient,
}

#[cfg(test)]
mod tests;
