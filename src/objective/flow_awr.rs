//! FlowAWR: regression to the old policy's prediction, moved towards (or away from) the sample.

use super::advantage_flow::{Gamma, anchored};
use super::{Deviation, Factor, Losses, Objective, Point, Requirements, TargetVelocities, adaptive_scale, measure};
use crate::error::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Which FlowAWR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// The released program's (Fuzm7/FlowAWR, scripts/train_awr_sd3.py at 05e993aa): in x0 estimates,
    /// `mean (f - f_old - A (x0 - f_old))^2 / w`.
    Released,
    /// The paper's equation 10: `mean (v - v_old - A (u - v_old))^2`, A without bounds.
    Paper,
    /// `A |f - x0|^2 + |f - f_old|^2` with A = w - 1: unscaled, its minimiser is the optimal velocity of the exponential
    /// tilt, where the two forms above overshoot by the density ratio h (`docs/METHODS.md`).
    Exact,
    /// As `Exact` with gamma (1.1) times the second term, so that every sample has a minimum, and with advantages that
    /// no single image can dominate ([`crate::advantage::AdvantageMap::ROBUST`]).
    Robust,
}

/// What a form comes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    /// Distance of the x0 estimate from its target.
    Estimate,
    /// Distance of the velocity from its target.
    Velocity,
    /// Signed distances from the sample and, times gamma, from the old policy's estimate.
    Anchored(Gamma),
}

impl Form {
    /// Its loss; `gamma` is the robust form's own.
    pub(super) fn loss(self, gamma: Option<Gamma>) -> Loss {
        match self {
            Form::Released => Loss::Estimate,
            Form::Paper => Loss::Velocity,
            Form::Exact => Loss::Anchored(Gamma::Constant(1.0)),
            Form::Robust => Loss::Anchored(gamma.unwrap_or(Gamma::Constant(1.1))),
        }
    }
}

/// FlowAWR's loss, plus `kl_coef * mean (v - v_ref)^2` in every form.
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
