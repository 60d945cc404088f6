//! How far velocities lie from each other ([`crate::ops::deviations`]).
//!
//! At a point of the forward process x0 estimates differ by -t times what their velocities differ by, and the sample itself
//! is the estimate of u = eps - x0: `f - x0 = -t (v - u)`, `f - f_old = -t (v - v_old)`. So all is measured in velocities,
//! and by their differences: where policy and old policy are equal their distance is exactly 0, and where they are close
//! no digit of it is lost beside the much larger velocities.

use super::{Point, TargetVelocities};
use crate::error::Result;
use crate::ops;
use candle_core::Tensor;

/// The factor of a difference of velocities.
#[derive(Debug, Clone)]
pub(super) enum Factor {
    /// The same for all samples.
    Number(f64),
    /// One each, `[B]`.
    Each(Tensor),
}

use Factor::Number;

impl Factor {
    /// `[B]`.
    fn column(&self, like: &Tensor) -> Result<Tensor> {
        match self {
            Number(number) => Ok(like.affine(0.0, *number)?),
            Self::Each(factors) => Ok(factors.clone()),
        }
    }
}

/// A weighted sum of the policy's difference from the old policy and the old policy's from u.
#[derive(Debug, Clone)]
pub(super) struct Deviation {
    /// Factor of `v - v_old`.
    pub from_old: Factor,
    /// Factor of `v_old - u`.
    pub old_from_target: Factor,
}

impl Deviation {
    /// `v - u`.
    pub const FROM_TARGET: Self = Self { from_old: Number(1.0), old_from_target: Number(1.0) };

    /// `v - v_old`.
    pub const FROM_OLD: Self = Self { from_old: Number(1.0), old_from_target: Number(0.0) };

    /// `v_old - u`.
    pub const OLD_FROM_TARGET: Self = Self { from_old: Number(0.0), old_from_target: Number(1.0) };
}

/// Means over dimensions, `[B]`.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Of the squares, with a gradient to the policy's velocity.
    pub square: Tensor,
    /// Of the magnitudes, likewise.
    pub magnitude: Tensor,
}

/// Measures deviations at the policy's velocity `v` `[B, C, H, W]`, four at most, in one pass over it.
///
/// # Errors
/// The old policy's velocity is absent, or the point is a rollout step.
pub(super) fn measure<const N: usize>(
    point: &Point,
    v: &Tensor,
    targets: &TargetVelocities,
    deviations: [Deviation; N],
) -> Result<[Measured; N]> {
    let others = Tensor::stack(&[targets.old()?, &point.target_velocity()?], 1)?; // [B, 2, C, H, W]
    let mut factors = Vec::new();
    for Deviation { from_old, old_from_target } in &deviations {
        factors.push(Tensor::stack(&[from_old.column(&point.t)?, old_from_target.column(&point.t)?], 1)?);
    }
    let means = means(v, &others, &Tensor::stack(&factors, 1)?)?;
    let mut measured = Vec::new();
    for index in 0..N {
        measured.push(of(&means, index)?);
    }
    Ok(std::array::from_fn(|index| measured[index].clone()))
}

/// Measures `v - other`, `[B, C, H, W]` each: the means of squares and magnitudes over a sample's dimensions.
///
/// # Errors
/// They are not of one shape.
pub fn distance(v: &Tensor, other: &Tensor) -> Result<Measured> {
    let one = Tensor::ones((v.dim(0)?, 1, 1), v.dtype(), v.device())?;
    of(&means(v, &other.unsqueeze(1)?, &one)?, 0)
}

/// Means over dimensions of squares and magnitudes, `[B, count, 2]`.
fn means(v: &Tensor, others: &Tensor, factors: &Tensor) -> Result<Tensor> {
    let dimensions: usize = v.dims()[1..].iter().product();
    Ok((ops::deviations(v, others, factors)? / dimensions as f64)?)
}

/// Deviation `index` of means `[B, count, 2]`.
fn of(means: &Tensor, index: usize) -> Result<Measured> {
    let means = means.narrow(1, index, 1)?;
    let mean = |kind: usize| means.narrow(2, kind, 1)?.flatten_all();
    Ok(Measured { square: mean(0)?, magnitude: mean(1)? })
}
