//! The rectified-flow path and the solvers: pure functions.
//!
//! `x_t = (1 - t) x0 + t eps`, velocity `u = eps - x0`, `x0 = x_t - t v`; t = 1 is noise.

mod ode;
mod schedule;
pub mod sde;

pub use ode::{Ode, solve};
pub use schedule::{DEFAULT_SHIFT, SamplerConfig, Solver, sigmas};

use crate::error::Result;
use candle_core::Tensor;

/// `(1 - t) x0 + t eps`: x0 and eps `[B, C, H, W]`, t `[B]`.
pub fn interpolate(x0: &Tensor, eps: &Tensor, t: &Tensor) -> Result<Tensor> {
    let t = column(t)?; // [B, 1, 1, 1]
    Ok((x0.broadcast_mul(&t.affine(-1.0, 1.0)?)? + eps.broadcast_mul(&t)?)?)
}

/// Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): `negative + guidance (v - negative)`.
pub fn guide(v: &Tensor, negative: &Tensor, guidance: f64) -> Result<Tensor> {
    Ok((negative + ((v - negative)? * guidance)?)?)
}

/// `[B]` as `[B, 1, 1, 1]`.
pub fn column(t: &Tensor) -> Result<Tensor> {
    Ok(t.reshape((t.dim(0)?, 1, 1, 1))?)
}
