//! DiffusionNFT: the policy's velocity defines a positive and a negative velocity around the old one; both regress to the
//! sample, weighted by the reward.

use super::Factor::Number;
use super::{Deviation, Frozen, Measured, Point, Terms, adaptive_scale, measure};
use crate::error::Result;
use candle_core::Tensor;

/// `r = A / (2 clip) + 1/2`, `v+ = mix v + (1 - mix) v_old`, `v- = (1 + mix) v_old - mix v`,
/// `loss = clip [ r mean (f+ - x0)^2 / w+ + (1 - r) mean (f- - x0)^2 / w- ] / mix + kl mean (v - v_ref)^2`, each branch
/// with its own scale w (NVlabs/DiffusionNFT, scripts/train_nft_sd3.py at 24af555, which calls mix `beta`).
#[derive(Debug, Clone, PartialEq)]
pub struct DiffusionNft {
    /// How far the two velocities lie from the old one, in units of the policy's distance.
    pub mix: f64,
    /// Bound of the advantages.
    pub clip: f64,
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
    /// Whether each branch is divided by its w.
    pub adaptive: bool,
}

impl DiffusionNft {
    pub(super) fn terms(&self, point: &Point, v: &Tensor, frozen: &Frozen) -> Result<Terms> {
        let r = point.advantage.affine(0.5 / self.clip, 0.5)?.clamp(0f64, 1f64)?; // [B]
        let branch = |mix: f64| Deviation { policy: Number(mix), old: Number(1.0 - mix), ..Deviation::FROM_TARGET };
        let deviations = [branch(self.mix), branch(-self.mix), Deviation::from_reference(self.kl_coef)];
        let [positive, negative, from_reference] = measure(point, v, frozen, deviations)?;
        let loss = |branch: &Measured, weight: &Tensor| -> Result<Tensor> {
            Ok(((&branch.square / adaptive_scale(point, branch, self.adaptive)?)? * weight)?)
        };
        let both = (loss(&positive, &r)? + loss(&negative, &r.affine(-1.0, 1.0)?)?)?;
        let policy = ((both * point.t.sqr()?)? * (self.clip / self.mix))?;
        Terms::new(policy, (from_reference.square * self.kl_coef)?)
    }
}
