//! Advantage weighted matching: policy gradient with the flow-matching loss in place of the log-likelihood.

use super::flow_grpo::surrogate;
use super::{Losses, Objective, Point, Requirements, TargetVelocities, distance};
use crate::error::Result;
use candle_core::Tensor;

/// `max(-a rho, -a clip(rho, 1 - c, 1 + c)) + anchor mean (v - v_old)^2 + kl mean (v - v_ref)^2` with `a = A / clip`,
/// `rho = exp(l - l_rollout)` and the pseudo log-likelihood `l = -4 t ((m + 1e-10)^(1/4) - 1e-10^(1/4))`, `m = mean (v - u)^2`
/// (scxue/advantage_weighted_matching at be51372, whose slow copy "ema" is our old policy). The rollouts are the policy's
/// own, so rho is 1 and only its gradient matters.
#[derive(Debug, Clone, PartialEq)]
pub struct Awm {
    /// c.
    pub ratio_clip: f64,
    /// Weight of the distance from the old policy.
    pub anchor: f64,
    /// Bound of the advantages.
    pub clip: f64,
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
}

impl Objective for Awm {
    fn requirements(&self) -> Requirements {
        Requirements {
            old: self.anchor > 0.0,
            reference: self.kl_coef > 0.0,
            on_policy: true,
            ..Requirements::default()
        }
    }

    fn losses(&self, point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Losses> {
        let likelihood = pseudo_log_likelihood(point, &distance(v, &point.target_velocity()?)?.square)?; // [B]
        let ratio = (&likelihood - likelihood.detach())?.exp()?;
        let mut policy = surrogate(&(&point.advantage / self.clip)?, &ratio, self.ratio_clip)?;
        if self.anchor > 0.0 {
            policy = (policy + (distance(v, targets.old()?)?.square * self.anchor)?)?;
        }
        Losses::new(policy, targets.kl(v, self.kl_coef)?)
    }
}

/// `-4 t ((m + 1e-10)^(1/4) - 1e-10^(1/4))` of `m = mean (v - u)^2`: `[B]`.
pub(super) fn pseudo_log_likelihood(point: &Point, square: &Tensor) -> Result<Tensor> {
    const FLOOR: f64 = 1e-10;
    let root = (square + FLOOR)?.sqrt()?.sqrt()?;
    Ok((root.affine(-4.0, 4.0 * FLOOR.sqrt().sqrt())? * &point.t)?)
}
