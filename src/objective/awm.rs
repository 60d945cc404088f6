//! Advantage weighted matching: policy gradient with the flow-matching loss in place of the log-likelihood.

use super::flow_grpo::surrogate;
use super::spec::{MethodSpec, bounded};
use super::{Losses, Objective, Point, Requirements, TargetVelocities, distance};
use crate::advantage::AdvantageMap;
use crate::checks::{Check, not_negative, positive};
use crate::error::Result;
use crate::optim::{OldPolicyDecay, OldPolicySchedule};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The keys of `[method]` with `name = "awm"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AwmConfig {
    /// How far the ratio may leave 1 before its gradient is cut.
    pub ratio_clip: f64,
    /// Weight of the distance from its slow copy, the old policy.
    pub anchor: f64,
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
}

impl Default for AwmConfig {
    fn default() -> Self {
        Self { ratio_clip: 1.0, anchor: 1.0, kl_coef: 1e-4 }
    }
}

impl MethodSpec for AwmConfig {
    fn check(&self, map: &AdvantageMap) -> Check {
        not_negative("method.kl_coef", self.kl_coef)?;
        positive("method.ratio_clip", self.ratio_clip)?;
        not_negative("method.anchor", self.anchor)?;
        bounded("awm", map)
    }

    fn map(&self) -> AdvantageMap {
        AdvantageMap::DIFFUSION_NFT
    }

    /// The released program's slow copy keeps 0.3 of itself at most.
    fn old_policy(&self, schedule: OldPolicySchedule) -> OldPolicyDecay {
        match schedule {
            OldPolicySchedule::Linear => OldPolicyDecay { max: 0.3, ..schedule.decay() },
            _ => schedule.decay(),
        }
    }

    fn objective(&self, map: &AdvantageMap) -> Box<dyn Objective> {
        let Self { ratio_clip, anchor, kl_coef } = *self;
        Box::new(Awm { ratio_clip, anchor, clip: map.bound(), kl_coef })
    }
}

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
            single_update: true,
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
