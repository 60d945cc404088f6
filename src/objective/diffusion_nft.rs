//! DiffusionNFT: the policy's velocity defines a positive and a negative velocity around the old one; both regress to the
//! sample, weighted by the reward.

use super::{Frozen, Point, Terms, adaptive_scale, distance, estimate, reference_distance};
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
        let (x0, _) = point.forward()?;
        let old = frozen.old()?;
        let r = point.advantage.affine(0.5 / self.clip, 0.5)?.clamp(0f64, 1f64)?; // [B]
        let positive = ((v * self.mix)? + (old * (1.0 - self.mix))?)?; // [B, C, H, W]
        let negative = ((old * (1.0 + self.mix))? - (v * self.mix)?)?;
        let branch = |velocity: &Tensor, weight: &Tensor| -> Result<Tensor> {
            let f = estimate(point, velocity)?;
            Ok(((distance(&f, x0)? / adaptive_scale(x0, &f, self.adaptive)?)? * weight)?)
        };
        let both = (branch(&positive, &r)? + branch(&negative, &r.affine(-1.0, 1.0)?)?)?;
        let policy = (both * (self.clip / self.mix))?;
        Terms::with_kl(policy, self.kl_coef, || reference_distance(v, frozen))
    }
}
