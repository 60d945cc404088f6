//! PEPG: policy gradient with a lower bound of the log-likelihood, held by how far that bound has moved.

use super::{Deviation, LEAST_SCALE, Losses, MethodSpec, Objective, Point, Requirements, TargetVelocities, measure};
use crate::advantage::AdvantageMap;
use crate::checks::{Check, not_negative, positive};
use crate::error::Result;
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

/// The keys of `[method]` with `name = "pepg"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PepgConfig {
    /// What the rewards' distances from their group's mean are multiplied by: the published beta / alpha.
    pub advantage_scale: f64,
    /// Weight of the distance from the base model: the published beta.
    pub kl_coef: f64,
}

impl Default for PepgConfig {
    fn default() -> Self {
        Self { advantage_scale: 0.1, kl_coef: 1e-4 }
    }
}

impl MethodSpec for PepgConfig {
    fn check(&self, _map: &AdvantageMap) -> Check {
        positive("method.advantage_scale", self.advantage_scale)?;
        not_negative("method.kl_coef", self.kl_coef)
    }

    fn map(&self) -> AdvantageMap {
        AdvantageMap::CENTRED
    }

    fn objective(&self, _map: &AdvantageMap) -> Box<dyn Objective> {
        let Self { advantage_scale, kl_coef } = *self;
        Box::new(Pepg { advantage_scale, kl_coef })
    }
}

/// `-e^d (a - d) E + kl mean (v - v_ref)^2` with `a = advantage_scale A`, the bound `E = -mean (f - x0)^2 / w` with
/// `w = max(mean |f - x0|, 1e-5)` and `d = E - E_old`; w and d have no gradient
/// (jaemoo-choi/rethinking-diffusion-rl, `pepg` with `elbo = "adaptive"`, src/utils/base.py at c2570002). Where it does not
/// move any more the bound has risen by a: d = a.
#[derive(Debug, Clone, PartialEq)]
pub struct Pepg {
    /// a / A.
    pub advantage_scale: f64,
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
}

impl Objective for Pepg {
    fn requirements(&self) -> Requirements {
        Requirements { old: true, reference: self.kl_coef > 0.0, ..Requirements::default() }
    }

    fn losses(&self, point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Losses> {
        let Bound { scale, rise } = bound(point, v, targets)?;
        let missing = ((&point.advantage * self.advantage_scale)? - &rise)?; // a - d, [B]
        let [from_target] = measure(point, v, targets, [Deviation::FROM_TARGET])?;
        let factor = ((rise.exp()? * missing)? * (point.t.sqr()? / scale)?)?;
        Losses::new((from_target.square * factor)?, targets.kl(v, self.kl_coef)?)
    }
}

/// What is outside the graph, `[B]` each.
struct Bound {
    /// w of the policy.
    scale: Tensor,
    /// d, by how much the policy's bound lies above the old policy's.
    rise: Tensor,
}

/// With `a = v - v_old`, `e = v_old - u`, s and m the means of squares and magnitudes,
/// `d = t^2 (s_old / w_old - s / w) = t^2 (s_old (w - w_old) / w_old - (s - s_old)) / w`. The differences are formed element
/// by element, `|e + a|^2 - |e|^2 = a (a + 2 e)` and `|e + a| - |e| = max(p, -p - 2 |e|)` with `p = a sign(e)`: those of two
/// nearly equal means would be mostly rounding, and they are 0 where the policies are equal.
fn bound(point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Bound> {
    let old = targets.old()?;
    let a = (v.detach() - old)?;
    let e = (old - point.target_velocity()?)?;
    let mean = |x: Tensor| -> Result<Tensor> {
        Ok(x.flatten_from(1)?.to_dtype(DType::F64)?.mean(1)?.to_dtype(point.t.dtype())?)
    };
    let magnitude = e.abs()?;
    let towards = (&a * e.ge(0.0)?.to_dtype(e.dtype())?.affine(2.0, -1.0)?)?; // a with the sign of a e
    let past_zero = (&towards + (&magnitude * 2.0)?)?.neg()?;
    let more_square = mean((&a * (&a + (&e * 2.0)?)?)?)?; // s - s_old
    let more_magnitude = mean(towards.maximum(&past_zero)?)?; // m - m_old
    let (old_square, old_magnitude) = (mean(e.sqr()?)?, mean(magnitude)?);

    let old_scale = (old_magnitude * &point.t)?.maximum(LEAST_SCALE)?;
    let more_scale = (more_magnitude * &point.t)?.maximum(&old_scale.affine(-1.0, LEAST_SCALE)?)?; // w - w_old
    let scale = (&old_scale + &more_scale)?;
    let by_scale = ((old_square * more_scale)? / old_scale)?;
    let rise = ((by_scale - more_square)? * (point.t.sqr()? / &scale)?)?;
    Ok(Bound { scale, rise })
}
