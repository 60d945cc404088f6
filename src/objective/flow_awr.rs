//! FlowAWR: regression to the old policy's prediction, moved towards (or away from) the sample.

use super::advantage_flow::{Gamma, anchored};
use super::spec::MethodSpec;
use super::{Deviation, Factor, Losses, Objective, Point, Requirements, TargetVelocities, adaptive_scale, measure};
use crate::advantage::AdvantageMap;
use crate::checks::{Check, not_negative, text};
use crate::error::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The keys of `[method]` with `name = "flow-awr"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FlowAwrConfig {
    /// "released", "paper", "exact" or "robust" (docs/METHODS.md).
    pub variant: Variant,
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
    /// Of the robust variant: weight of the distance from the old policy, "1-A" or a number; left
    /// out: 1.1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gamma: Option<Gamma>,
    /// Divides the loss by the mean distance of the x0 estimate from x0; left out: unless the
    /// variant is "paper".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adaptive_scale: Option<bool>,
}

impl Default for FlowAwrConfig {
    fn default() -> Self {
        Self { variant: Variant::Released, kl_coef: 1e-4, gamma: None, adaptive_scale: None }
    }
}

impl FlowAwrConfig {
    fn gamma(&self) -> Gamma {
        self.gamma.unwrap_or(Gamma::Constant(1.1))
    }

    fn adaptive_scale(&self) -> bool {
        self.adaptive_scale.unwrap_or(self.variant != Variant::Paper)
    }
}

impl MethodSpec for FlowAwrConfig {
    fn check(&self, map: &AdvantageMap) -> Check {
        not_negative("method.kl_coef", self.kl_coef)?;
        let lowest = map.lowest();
        if matches!(self.variant, Variant::Exact | Variant::Robust) && lowest < -1.0 {
            return Err(format!(
                "method.variant = {}: needs advantages of -1 or more, and this map goes down to {lowest}; set \
                 advantage.map = \"softmax\" or method.variant = \"released\"",
                text(self.variant)?
            ));
        }
        match (self.gamma, self.variant) {
            (None, _) => Ok(()),
            (Some(gamma), Variant::Robust) => gamma.check(lowest),
            (Some(gamma), _) => Err(format!(
                "method.gamma = {}: belongs to FlowAWR's robust variant; remove it or set method.variant = \"robust\"",
                text(gamma)?
            )),
        }
    }

    fn resolve(&mut self) {
        self.gamma = (self.variant == Variant::Robust).then_some(self.gamma());
        self.adaptive_scale = Some(self.adaptive_scale());
    }

    fn map(&self) -> AdvantageMap {
        match self.variant {
            Variant::Released => AdvantageMap::FLOW_AWR,
            Variant::Paper | Variant::Exact => AdvantageMap::FLOW_AWR_PAPER,
            Variant::Robust => AdvantageMap::ROBUST,
        }
    }

    fn objective(&self, _map: &AdvantageMap) -> Box<dyn Objective> {
        let loss = match self.variant {
            Variant::Released => Loss::Estimate,
            Variant::Paper => Loss::Velocity,
            Variant::Exact => Loss::Anchored(Gamma::Constant(1.0)),
            Variant::Robust => Loss::Anchored(self.gamma()),
        };
        Box::new(FlowAwr { loss, kl_coef: self.kl_coef, adaptive: self.adaptive_scale() })
    }
}

/// Which FlowAWR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// The released program's (Fuzm7/FlowAWR, scripts/train_awr_sd3.py at 05e993aa): in x0 estimates,
    /// `mean (f - f_old - A (x0 - f_old))^2 / w`.
    Released,
    /// The paper's equation 10: `mean (v - v_old - A (u - v_old))^2`, A without bounds.
    Paper,
    /// `A |f - x0|^2 + |f - f_old|^2` with A = w - 1: unscaled, its minimiser is the optimal velocity of the exponential
    /// tilt, where the two variants above overshoot by the density ratio h (`docs/METHODS.md`).
    Exact,
    /// As `Exact` with gamma (1.1) times the second term, so that every sample has a minimum, and with advantages that
    /// no single image can dominate ([`crate::advantage::AdvantageMap::ROBUST`]).
    Robust,
}

/// What a variant comes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    /// Distance of the x0 estimate from its target.
    Estimate,
    /// Distance of the velocity from its target.
    Velocity,
    /// Signed distances from the sample and, times gamma, from the old policy's estimate.
    Anchored(Gamma),
}

/// FlowAWR's loss, plus `kl_coef * mean (v - v_ref)^2` in every variant.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowAwr {
    /// Which of them.
    pub loss: Loss,
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
    /// Whether the loss is divided by `w = max(mean |f - x0|, 1e-5)`, outside the graph.
    pub adaptive: bool,
}

impl Objective for FlowAwr {
    fn requirements(&self) -> Requirements {
        Requirements { old: true, reference: self.kl_coef > 0.0, ..Requirements::default() }
    }

    fn losses(&self, point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Losses> {
        let a = &point.advantage; // [B]
        let aim = match self.loss {
            // v - v_old - A (u - v_old)
            Loss::Estimate | Loss::Velocity => {
                Deviation { from_old: Factor::Number(1.0), old_from_target: Factor::Each(a.clone()) }
            }
            Loss::Anchored(_) => Deviation::FROM_OLD,
        };
        let [aim, from_target] = measure(point, v, targets, [aim, Deviation::FROM_TARGET])?;
        let loss = match self.loss {
            Loss::Estimate => (aim.square * point.t.sqr()?)?,
            Loss::Velocity => aim.square,
            Loss::Anchored(gamma) => anchored(point, &from_target, &aim, gamma)?,
        }; // [B]
        let policy = (loss / adaptive_scale(point, &from_target, self.adaptive)?)?;
        Losses::new(policy, targets.kl(v, self.kl_coef)?)
    }
}
