//! How far velocities lie from each other, all that an objective asks for in one pass over the micro-batch
//! ([`crate::model::ops::deviations`]).
//!
//! At a point of the forward process x0 estimates differ by -t times what their velocities differ by, and the sample itself
//! is the estimate of u = eps - x0: `f - x0 = -t (v - u)`, `f - f_old = -t (v - v_old)`. So all is measured in velocities.

use super::{Frozen, Point};
use crate::error::Result;
use crate::model::ops;
use candle_core::Tensor;

/// The factor of a velocity.
#[derive(Debug, Clone)]
pub(super) enum Factor {
    /// The same for all samples.
    Number(f64),
    /// One each, `[B]`.
    Each(Tensor),
}

use Factor::Number;

impl Factor {
    fn counts(&self) -> bool {
        !matches!(self, Number(0.0))
    }

    /// `[B]`.
    fn column(&self, like: &Tensor) -> Result<Tensor> {
        match self {
            Number(number) => Ok(like.affine(0.0, *number)?),
            Self::Each(factors) => Ok(factors.clone()),
        }
    }
}

/// A weighted sum of velocities.
#[derive(Debug, Clone)]
pub(super) struct Deviation {
    /// Factor of the policy's, v.
    pub policy: Factor,
    /// Of the old policy's.
    pub old: Factor,
    /// Of u.
    pub target: Factor,
    /// Of the base model's.
    pub reference: Factor,
}

impl Deviation {
    /// Nothing: no velocity is asked for.
    pub const NONE: Self = Self { policy: Number(0.0), old: Number(0.0), target: Number(0.0), reference: Number(0.0) };

    /// `v - u`.
    pub const FROM_TARGET: Self = Self { policy: Number(1.0), target: Number(-1.0), ..Self::NONE };

    /// `v - v_old`.
    pub const FROM_OLD: Self = Self { policy: Number(1.0), old: Number(-1.0), ..Self::NONE };

    /// `v - v_ref`; nothing where the distance does not count.
    pub fn from_reference(kl_coef: f64) -> Self {
        match kl_coef > 0.0 {
            true => Self { policy: Number(1.0), reference: Number(-1.0), ..Self::NONE },
            false => Self::NONE,
        }
    }
}

/// Means over dimensions, `[B]`.
#[derive(Debug, Clone)]
pub(super) struct Measured {
    /// Of the squares, with a gradient to the policy's velocity.
    pub square: Tensor,
    /// Of the magnitudes, likewise.
    pub magnitude: Tensor,
}

/// Measures deviations at the policy's velocity `v` `[B, C, H, W]`, four at most.
///
/// # Errors
/// A velocity that has a factor is absent.
pub(super) fn measure<const N: usize>(
    point: &Point,
    v: &Tensor,
    frozen: &Frozen,
    deviations: [Deviation; N],
) -> Result<[Measured; N]> {
    let of = |factor: fn(&Deviation) -> &Factor| deviations.iter().map(factor);
    let mut others = Vec::new();
    let mut factors = vec![of(|d| &d.policy).collect::<Vec<_>>()];
    let mut add = |of: Vec<_>, velocity: &dyn Fn() -> Result<Tensor>| -> Result<()> {
        if of.iter().any(|factor: &&Factor| factor.counts()) {
            others.push(velocity()?);
            factors.push(of);
        }
        Ok(())
    };
    add(of(|d| &d.old).collect(), &|| Ok(frozen.old()?.clone()))?;
    add(of(|d| &d.target).collect(), &|| point.forward().and_then(|(x0, eps)| Ok((eps - x0)?)))?;
    add(of(|d| &d.reference).collect(), &|| Ok(frozen.reference()?.clone()))?;
    let columns = |of: Vec<&Factor>| {
        Ok(Tensor::stack(&of.into_iter().map(|f| f.column(&point.t)).collect::<Result<Vec<_>>>()?, 1)?)
    };
    let factors = Tensor::stack(&factors.into_iter().map(columns).collect::<Result<Vec<_>>>()?, 2)?; // [B, N, terms]
    let sums = ops::deviations(v, &Tensor::stack(&others, 1)?, &factors)?; // [B, N, 2]
    let means = (sums / v.dims()[1..].iter().product::<usize>() as f64)?;
    let mean = |m: usize, i: usize| -> Result<Tensor> { Ok(means.narrow(1, m, 1)?.narrow(2, i, 1)?.flatten_all()?) };
    let measured = (0..N).map(|m| Ok(Measured { square: mean(m, 0)?, magnitude: mean(m, 1)? }));
    let measured = measured.collect::<Result<Vec<_>>>()?;
    Ok(std::array::from_fn(|m| measured[m].clone()))
}
