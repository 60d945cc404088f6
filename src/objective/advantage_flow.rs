//! AdvantageFlow: signed regression to the sample, held by the old policy and the base model.

use super::spec::MethodSpec;
use super::{Deviation, Losses, Measured, Objective, Point, Requirements, TargetVelocities, adaptive_scale, measure};
use crate::advantage::AdvantageMap;
use crate::checks::{Check, not_negative, text};
use crate::error::Result;
use candle_core::Tensor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The keys of `[method]` with `name = "advantage-flow"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvantageFlowConfig {
    /// Weight of the distance from the old policy: "1-A" or a number, such as the published 1.1.
    pub gamma: Gamma,
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
    /// What that is measured in, where it counts: "velocity", or "estimate" of x0
    /// (docs/METHODS.md).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_space: Option<KlSpace>,
    /// Divides the loss by the mean distance of the x0 estimate from x0.
    pub adaptive_scale: bool,
}

impl Default for AdvantageFlowConfig {
    fn default() -> Self {
        Self { gamma: Gamma::OneMinusAdvantage, kl_coef: 1e-3, kl_space: None, adaptive_scale: true }
    }
}

impl AdvantageFlowConfig {
    fn kl_space(&self) -> KlSpace {
        self.kl_space.unwrap_or(KlSpace::Velocity)
    }
}

impl MethodSpec for AdvantageFlowConfig {
    fn check(&self, map: &AdvantageMap) -> Check {
        not_negative("method.kl_coef", self.kl_coef)?;
        if let (Some(space), 0.0) = (self.kl_space, self.kl_coef) {
            return Err(format!(
                "method.kl_space = {}: method.kl_coef = 0, so no distance is measured; remove one of the two",
                text(space)?
            ));
        }
        self.gamma.check(map.lowest())
    }

    fn resolve(&mut self) {
        self.kl_space = (self.kl_coef > 0.0).then_some(self.kl_space());
    }

    fn map(&self) -> AdvantageMap {
        AdvantageMap::ADVANTAGE_FLOW
    }

    fn objective(&self, _map: &AdvantageMap) -> Box<dyn Objective> {
        let (gamma, kl_coef, kl_space) = (self.gamma, self.kl_coef, self.kl_space());
        Box::new(AdvantageFlow { gamma, kl_coef, kl_space, adaptive: self.adaptive_scale })
    }
}

/// The weight gamma of the distance from the old policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gamma {
    /// `1 - A`: every sample has the same curvature.
    OneMinusAdvantage,
    /// A number above the largest -A: the published one is 1.1, for advantages within 1.
    Constant(f64),
}

impl Gamma {
    /// Refuses a number with which `A |f - x0|^2 + gamma |f - f_old|^2` has no minimum: A + gamma must be above 0 for the
    /// lowest advantage, too.
    pub(super) fn check(self, lowest: f64) -> Check {
        match self {
            Gamma::Constant(gamma) if !gamma.is_finite() || gamma <= -lowest => Err(format!(
                "method.gamma = {gamma}: must be a number above {}, or the loss has no minimum for a sample of advantage \
                 {lowest}; use {} or \"1-A\"",
                -lowest,
                0.1 - lowest
            )),
            _ => Ok(()),
        }
    }
}

/// What the distance from the base model is measured in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlSpace {
    /// Velocities, as every other method's and in the only public configuration of the recipe (`kl_type: v-based` of
    /// yunfeixie233/Flow-Factory, examples/nft/lora/sd3_5/pickapic_multi_reward.yaml at 0270c4d6).
    Velocity,
    /// x0 estimates, divided by w like the other two distances (the loss as quoted by arXiv 2609.37670, equation 2).
    Estimate,
}

/// `[A |f - x0|^2 + gamma |f - f_old|^2] / w + kl |v - v_ref|^2`, means over dimensions, `w = max(mean |f - x0|, 1e-5)`
/// (arXiv 2605.26013; the loss as quoted by arXiv 2609.37670, equation 2); or `kl |f - f_ref|^2` inside the bracket.
#[derive(Debug, Clone, PartialEq)]
pub struct AdvantageFlow {
    /// Rollout regularisation.
    pub gamma: Gamma,
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
    /// What that is measured in.
    pub kl_space: KlSpace,
    /// Whether the loss is divided by w.
    pub adaptive: bool,
}

impl Objective for AdvantageFlow {
    fn requirements(&self) -> Requirements {
        Requirements { old: true, reference: self.kl_coef > 0.0, ..Requirements::default() }
    }

    fn losses(&self, point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Losses> {
        let [from_target, from_old] = measure(point, v, targets, [Deviation::FROM_TARGET, Deviation::FROM_OLD])?;
        let scale = adaptive_scale(point, &from_target, self.adaptive)?;
        let policy = (anchored(point, &from_target, &from_old, self.gamma)? / &scale)?;
        let kl = match self.kl_space {
            KlSpace::Velocity => targets.kl(v, self.kl_coef)?,
            KlSpace::Estimate => (targets.kl(v, self.kl_coef)? * (point.t.sqr()? / scale)?)?,
        };
        Losses::new(policy, kl)
    }
}

/// `A |f - x0|^2 + gamma |f - f_old|^2`, means over dimensions: `[B]`.
pub(super) fn anchored(point: &Point, from_target: &Measured, from_old: &Measured, gamma: Gamma) -> Result<Tensor> {
    let a = &point.advantage; // [B]
    let gamma = match gamma {
        Gamma::OneMinusAdvantage => a.affine(-1.0, 1.0)?,
        Gamma::Constant(gamma) => a.affine(0.0, gamma)?,
    };
    Ok((((&from_target.square * a)? + (&from_old.square * gamma)?)? * point.t.sqr()?)?)
}

/// What the configuration says: the text "1-A" or a number.
#[derive(Deserialize)]
#[serde(untagged, expecting = "\"1-A\" or a number such as 1.1")]
enum Written {
    Number(f64),
    Text(String),
}

impl<'de> Deserialize<'de> for Gamma {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match Written::deserialize(deserializer)? {
            Written::Number(gamma) => Ok(Gamma::Constant(gamma)),
            Written::Text(text) if text == "1-A" => Ok(Gamma::OneMinusAdvantage),
            Written::Text(text) => Err(serde::de::Error::custom(format!(
                "\"{text}\" is no gamma; expected \"1-A\" or a number such as 1.1"
            ))),
        }
    }
}

impl Serialize for Gamma {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Gamma::OneMinusAdvantage => serializer.serialize_str("1-A"),
            Gamma::Constant(gamma) => serializer.serialize_f64(*gamma),
        }
    }
}
