//! DiffusionNFT: the policy's velocity defines a positive and a negative velocity around the old one; both regress to the
//! sample, weighted by the reward.

use super::Factor::{Each, Number};
use super::spec::{MethodSpec, bounded};
use super::{Deviation, LEAST_SCALE, Losses, Objective, Point, Requirements, TargetVelocities, measure};
use crate::advantage::AdvantageMap;
use crate::checks::{Check, not_negative, positive};
use crate::error::Result;
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

/// The keys of `[method]` with `name = "diffusion-nft"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiffusionNftConfig {
    /// The paper's beta: how far its two velocities lie from the old one, in units of the policy's
    /// distance.
    pub nft_beta: f64,
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
    /// Divides the loss by the mean distance of the x0 estimate from x0.
    pub adaptive_scale: bool,
}

impl Default for DiffusionNftConfig {
    fn default() -> Self {
        Self { nft_beta: 1.0, kl_coef: 1e-4, adaptive_scale: true }
    }
}

impl MethodSpec for DiffusionNftConfig {
    fn check(&self, map: &AdvantageMap) -> Check {
        not_negative("method.kl_coef", self.kl_coef)?;
        positive("method.nft_beta", self.nft_beta)?;
        bounded("diffusion-nft", map)
    }

    fn map(&self) -> AdvantageMap {
        AdvantageMap::DIFFUSION_NFT
    }

    fn objective(&self, map: &AdvantageMap) -> Box<dyn Objective> {
        let (beta, clip, kl_coef) = (self.nft_beta, map.bound(), self.kl_coef);
        Box::new(DiffusionNft { beta, clip, kl_coef, adaptive: self.adaptive_scale })
    }
}

/// `r = A / (2 clip) + 1/2`, `v+ = beta v + (1 - beta) v_old`, `v- = (1 + beta) v_old - beta v`,
/// `loss = clip [ r mean (f+ - x0)^2 / w+ + (1 - r) mean (f- - x0)^2 / w- ] / beta + kl mean (v - v_ref)^2`, each branch
/// with its own scale w (NVlabs/DiffusionNFT, scripts/train_nft_sd3.py at 24af555, `config.beta`).
///
/// The branches' gradients are nearly opposite wherever the reward says little, so they are never formed. With
/// `d = beta (v - v_old)` and `e = v_old - u` the branches lie `e + d` and `e - d` from the sample, and the square is completed:
/// the loss is `clip t^2 S mean (d + rho e)^2 / beta` and what does not depend on v, where `S = r / w+ + (1 - r) / w-` and
/// `rho = (r / w+ - (1 - r) / w-) / S`: regression to `v_old + rho (u - v_old) / beta`.
#[derive(Debug, Clone, PartialEq)]
pub struct DiffusionNft {
    /// How far the two velocities lie from the old one, in units of the policy's distance.
    pub beta: f64,
    /// Bound of the advantages.
    pub clip: f64,
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
    /// Whether each branch is divided by its w.
    pub adaptive: bool,
}

impl Objective for DiffusionNft {
    fn requirements(&self) -> Requirements {
        Requirements { old: true, reference: self.kl_coef > 0.0, ..Requirements::default() }
    }

    fn losses(&self, point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Losses> {
        let preference = (&point.advantage / self.clip)?.clamp(-1f64, 1f64)?; // 2 r - 1, [B]
        let Scales { smaller, apart, sign } = self.scales(point, v, targets)?;
        let product = (&smaller * (&smaller + &apart)?)?; // w+ w-
        let rest = (((&preference * &sign)?.affine(-0.5, 0.5)?) * apart)?;
        let sum = (&smaller + &rest)?; // r w- + (1 - r) w+
        let difference = ((&preference * smaller)? - (rest * sign)?)?; // r w- - (1 - r) w+
        let aim = Deviation { from_old: Number(self.beta), old_from_target: Each((difference / &sum)?) };
        let [aim, fixed] = measure(point, v, targets, [aim, Deviation::OLD_FROM_TARGET])?;
        // Their weights are S and 4 r (1 - r) / (w+ w- S).
        let moving = (aim.square * (&sum / product)?)?;
        let fixed = (fixed.square * (preference.sqr()?.affine(-1.0, 1.0)? / sum)?)?;
        let policy = (((moving + fixed)? * point.t.sqr()?)? * (self.clip / self.beta))?;
        Losses::new(policy, targets.kl(v, self.kl_coef)?)
    }
}

impl DiffusionNft {
    /// The scales of the branches, outside the graph.
    ///
    /// Of two numbers `(|e + d| + |e - d|) / 2 = max(|e|, |d|)`, and `(|e + d| - |e - d|) / 2` is the smaller magnitude with
    /// the sign of `e d`: the difference of the scales comes without the digits that two nearly equal means would cost.
    fn scales(&self, point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Scales> {
        if !self.adaptive {
            let none = point.t.zeros_like()?;
            return Ok(Scales { smaller: point.t.ones_like()?, apart: none.clone(), sign: none });
        }
        let old = targets.old()?;
        let d = ((v.detach() - old)? * self.beta)?;
        let e = (old - point.target_velocity()?)?;
        let magnitude = e.abs()?;
        let signed = (&d * e.sign()?)?.minimum(&magnitude)?.maximum(&magnitude.neg()?)?;
        let mean = |x: Tensor| -> Result<Tensor> {
            let mean = x.flatten_from(1)?.to_dtype(DType::F64)?.mean(1)?;
            Ok((mean.to_dtype(point.t.dtype())? * &point.t)?)
        };
        let (half_sum, half_difference) = (mean(magnitude.maximum(&d.abs()?)?)?, mean(signed)?);
        let apart = half_difference.abs()?;
        let smaller = (&half_sum - &apart)?.maximum(LEAST_SCALE)?;
        let above_least = ((half_sum + &apart)? - LEAST_SCALE)?.relu()?; // of the larger one
        Ok(Scales { smaller, apart: (apart * 2.0)?.minimum(&above_least)?, sign: half_difference.sign()? })
    }
}

/// The scales w+ and w-, `[B]`.
struct Scales {
    /// The smaller one.
    smaller: Tensor,
    /// By how much the other one is larger.
    apart: Tensor,
    /// Which one that is: 1 for w+, -1 for w-.
    sign: Tensor,
}
