//! Flow-GRPO: policy gradient on the steps of stochastic rollouts.

use super::spec::MethodSpec;
use super::{Losses, Objective, Point, Requirements, Target, TargetVelocities};
use crate::advantage::AdvantageMap;
use crate::checks::{Check, not_negative, positive};
use crate::error::{Error, Result};
use crate::flow::{column, sde};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The keys of `[method]` with `name = "flow-grpo"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FlowGrpoConfig {
    /// How far the ratio may leave 1 before its gradient is cut.
    pub ratio_clip: f64,
    /// Weight of the distance of the step's mean from the base model's.
    pub kl_coef: f64,
}

impl Default for FlowGrpoConfig {
    fn default() -> Self {
        Self { ratio_clip: 1e-4, kl_coef: 0.04 }
    }
}

impl MethodSpec for FlowGrpoConfig {
    fn check(&self, _map: &AdvantageMap) -> Check {
        not_negative("method.kl_coef", self.kl_coef)?;
        positive("method.ratio_clip", self.ratio_clip)
    }

    fn map(&self) -> AdvantageMap {
        AdvantageMap::DIFFUSION_NFT
    }

    fn objective(&self, _map: &AdvantageMap) -> Box<dyn Objective> {
        Box::new(FlowGrpo { ratio_clip: self.ratio_clip, kl_coef: self.kl_coef })
    }
}

/// `max(-A rho, -A clip(rho, 1 - c, 1 + c)) + kl mean (mu - mu_ref)^2 / (2 s^2)`, `rho = exp(log p - log p_rollout)`, mu the
/// mean of the step and s its noise rate (yifan123/flow_grpo, scripts/train_sd3.py at ac4c86e).
#[derive(Debug, Clone, PartialEq)]
pub struct FlowGrpo {
    /// c.
    pub ratio_clip: f64,
    /// Weight of the distance of the step's mean from the base model's.
    pub kl_coef: f64,
}

impl Objective for FlowGrpo {
    fn requirements(&self) -> Requirements {
        Requirements { reference: self.kl_coef > 0.0, trajectory: true, on_policy: true, ..Requirements::default() }
    }

    fn losses(&self, point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Losses> {
        let Target::Reverse { next, log_prob, x_factor, v_factor, std, rate } = &point.target else {
            return Err(Error::Failed("Flow-GRPO needs the steps of stochastic rollouts".into()));
        };
        let state = point.x_t.broadcast_mul(&column(x_factor)?)?; // [B, C, H, W]
        let mu = (state + v.broadcast_mul(&column(v_factor)?)?)?;
        let ratio = (sde::log_prob(next, &mu, std)? - log_prob)?.exp()?; // [B]
        let policy = surrogate(&point.advantage, &ratio, self.ratio_clip)?;
        // mu - mu_ref = v_factor (v - v_ref)
        let kl = (targets.kl(v, self.kl_coef)? * ((v_factor / rate)?.sqr()? * 0.5)?)?;
        Losses::new(policy, kl)
    }
}

/// `max(-A rho, -A clip(rho, 1 - c, 1 + c))` `[B]` (Schulman et al., arXiv 1707.06347).
pub(super) fn surrogate(advantage: &Tensor, ratio: &Tensor, clip: f64) -> Result<Tensor> {
    let gain = advantage.neg()?;
    let clipped = ratio.clamp(1.0 - clip, 1.0 + clip)?;
    Ok((&gain * ratio)?.maximum(&(&gain * clipped)?)?)
}
