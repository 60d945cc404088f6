//! Objectives: pure arithmetic on velocities. One file a method; `docs/METHODS.md` has them in one notation.
//!
//! A training loop takes any [`Objective`]: one of the methods here, or the caller's own.

mod advantage_flow;
mod awm;
mod config;
mod deviation;
mod diffusion_nft;
mod flow_awr;
mod flow_grpo;
mod pepg;
mod spec;

pub use advantage_flow::{AdvantageFlowConfig, Gamma, KlSpace};
pub use awm::AwmConfig;
pub use config::{AdvantageConfig, Method, MethodConfig};
pub use diffusion_nft::DiffusionNftConfig;
pub use flow_awr::{FlowAwrConfig, Variant};
pub use flow_grpo::FlowGrpoConfig;
pub use pepg::PepgConfig;
pub use spec::MethodSpec;

use crate::error::{Error, Result};
use candle_core::Tensor;
use deviation::{Deviation, Factor, measure};
pub use deviation::{Measured, distance};
use std::fmt::Debug;

/// What an objective asks for beside the policy's velocity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Requirements {
    /// The old policy's velocity.
    pub old: bool,
    /// The base model's velocity.
    pub reference: bool,
    /// The states of stochastic rollouts with their log-probabilities ([`Target::Reverse`]).
    pub trajectory: bool,
    /// Rollouts of the policy itself, not of the old policy.
    pub on_policy: bool,
    /// A policy that has not moved since the rollouts: one update an iteration.
    pub single_update: bool,
}

/// One micro-batch of training points.
pub struct Point {
    /// Where the velocity is asked for, `[B, C, H, W]`.
    pub x_t: Tensor,
    /// At which time, `[B]`.
    pub t: Tensor,
    /// Advantages, `[B]`.
    pub advantage: Tensor,
    /// What lies on the other side.
    pub target: Target,
}

/// What a training point was made from.
pub enum Target {
    /// A sample and noise: `x_t = (1 - t) x0 + t eps`.
    Forward {
        /// The sample, `[B, C, H, W]`.
        x0: Tensor,
        /// The noise, `[B, C, H, W]`.
        eps: Tensor,
    },
    /// A step of a stochastic rollout from `x_t`: `next ~ N(x_factor x_t + v_factor v, std^2)`.
    Reverse {
        /// Where it went, `[B, C, H, W]`.
        next: Tensor,
        /// Log-probability of going there, mean over dimensions, when it was sampled, `[B]`.
        log_prob: Tensor,
        /// Factor of the state, `[B]`.
        x_factor: Tensor,
        /// Factor of the velocity, `[B]`.
        v_factor: Tensor,
        /// Standard deviation, `[B]`.
        std: Tensor,
        /// Noise rate, `[B]`.
        rate: Tensor,
    },
}

impl Point {
    /// u = eps - x0 of a point of the forward process, `[B, C, H, W]`.
    ///
    /// # Errors
    /// The point is a rollout step.
    pub fn target_velocity(&self) -> Result<Tensor> {
        let (x0, eps) = self.forward()?;
        Ok((eps - x0)?)
    }

    /// (x0, eps) of a point of the forward process.
    ///
    /// # Errors
    /// The point is a rollout step.
    pub fn forward(&self) -> Result<(&Tensor, &Tensor)> {
        match &self.target {
            Target::Forward { x0, eps } => Ok((x0, eps)),
            Target::Reverse { .. } => {
                Err(Error::Failed("the objective needs samples and noise, not rollout steps".into()))
            }
        }
    }
}

/// The velocities of a micro-batch that the policy's is compared with, those that the objective requires; no gradient
/// flows through them.
pub struct TargetVelocities {
    /// Of the old policy, `[B, C, H, W]`.
    pub old: Option<Tensor>,
    /// Of the base model, `[B, C, H, W]`.
    pub reference: Option<Tensor>,
}

/// The losses of a micro-batch, a value a sample.
pub struct Losses {
    /// What is minimised, `[B]`.
    pub loss: Tensor,
    /// Its part from the rewards, `[B]`.
    pub policy: Tensor,
    /// Its part from the distance to the base model, `[B]`.
    pub kl: Tensor,
}

/// What an update minimises: pure arithmetic on the velocities of a micro-batch.
///
/// ```
/// use flowrl_dist::objective::{Losses, Objective, Point, Requirements, TargetVelocities, distance};
///
/// /// `A mean (v - u)^2`: regression to the samples, weighted by their advantages.
/// #[derive(Debug)]
/// struct Weighted;
///
/// impl Objective for Weighted {
///     fn requirements(&self) -> Requirements {
///         Requirements::default()
///     }
///
///     fn losses(
///         &self,
///         point: &Point,
///         v: &candle_core::Tensor,
///         targets: &TargetVelocities,
///     ) -> flowrl_dist::Result<Losses> {
///         let policy = (distance(v, &point.target_velocity()?)?.square * &point.advantage)?;
///         Losses::new(policy, targets.kl(v, 0.0)?)
///     }
/// }
/// ```
pub trait Objective: Debug + Send + Sync {
    /// What it asks for beside the policy's velocity.
    fn requirements(&self) -> Requirements;

    /// The losses at the policy's velocity `v` `[B, C, H, W]`, from which its gradient is taken.
    ///
    /// # Errors
    /// What it requires is absent, or the point is of another process than it trains on.
    fn losses(&self, point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Losses>;
}

impl Losses {
    /// The sum of the part from the rewards and the distance to the base model, `[B]` each.
    ///
    /// # Errors
    /// They are not of one shape.
    pub fn new(policy: Tensor, kl: Tensor) -> Result<Self> {
        Ok(Self { loss: (&policy + &kl)?, policy, kl })
    }
}

impl TargetVelocities {
    /// The old policy's velocity `[B, C, H, W]`, for an objective that requires it.
    ///
    /// # Errors
    /// It is absent.
    pub fn old(&self) -> Result<&Tensor> {
        promised(&self.old, "old policy's")
    }

    /// The base model's velocity `[B, C, H, W]`, for an objective that requires it.
    ///
    /// # Errors
    /// It is absent.
    pub fn reference(&self) -> Result<&Tensor> {
        promised(&self.reference, "base model's")
    }

    /// `kl_coef mean (v - v_ref)^2`, `[B]`; 0 without the base model's velocity where `kl_coef` is 0.
    ///
    /// # Errors
    /// The base model's velocity counts and is absent.
    pub fn kl(&self, v: &Tensor, kl_coef: f64) -> Result<Tensor> {
        match kl_coef > 0.0 {
            true => Ok((distance(v, self.reference()?)?.square * kl_coef)?),
            false => Ok(Tensor::zeros(v.dim(0)?, v.dtype(), v.device())?),
        }
    }
}

fn promised<'a>(v: &'a Option<Tensor>, name: &str) -> Result<&'a Tensor> {
    v.as_ref().ok_or_else(|| Error::Failed(format!("the objective needs the {name} velocity, which is absent")))
}

/// What the adaptive scale is at least.
const LEAST_SCALE: f64 = 1e-5;

/// The adaptive scale `max(mean |f - x0|, 1e-5)`, `[B]`, outside the graph (DiffusionNFT, scripts/train_nft_sd3.py at
/// 24af555), of the deviation of f's velocity from u; 1 where it is switched off.
fn adaptive_scale(point: &Point, from_target: &Measured, adaptive: bool) -> Result<Tensor> {
    match adaptive {
        true => Ok((from_target.magnitude.detach() * &point.t)?.maximum(LEAST_SCALE)?),
        false => Ok(point.t.ones_like()?),
    }
}

#[cfg(test)]
mod tests;
