//! Differentiable operations that candle lacks or differentiates slowly.
//!
//! candle's own fused softmax and norms have no backward and cut the gradient without an error, and its rules form
//! the gradient of frozen operands too. Each operation here is one pass forward and one back, keeps nothing but its
//! inputs, and forms only the gradients that are asked for. Tests compare each with the composed form and with finite
//! differences in f64.

mod activation;
mod attention;
mod float;
#[cfg(feature = "cuda")]
mod gpu;
mod linear;
mod norm;
mod op;
mod residual;
mod seed;
mod time;

pub use activation::{gelu, silu};
pub use attention::attention;
pub use linear::linear;
pub use norm::{layer_norm_modulate, rms_norm};
pub use residual::gated_residual;
pub use seed::seed;
pub use time::time_features;

#[cfg(test)]
mod tests;
