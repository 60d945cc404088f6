//! Objectives: pure arithmetic on velocities. One file a method; `docs/METHODS.md` has them in one notation.

mod advantage_flow;
mod awm;
mod config;
mod deviation;
mod diffusion_nft;
mod flow_awr;
mod flow_grpo;

pub use advantage_flow::{Gamma, KlSpace};
pub use config::{AdvantageConfig, Method, MethodConfig};
pub use flow_awr::Form;

use crate::advantage::AdvantageMap;
use crate::error::{Error, Result};
use candle_core::Tensor;
use deviation::{Deviation, Factor, Measured, distance, measure};

/// What an objective asks for beside the policy's velocity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// The old policy's velocity.
    pub old: bool,
    /// The base model's velocity.
    pub reference: bool,
    /// The states of stochastic rollouts with their log-probabilities ([`Target::Reverse`]).
    pub trajectory: bool,
    /// Rollouts of the policy itself, not of the old policy.
    pub on_policy: bool,
}

/// One micro-batch of training points.
pub struct Point {
    /// Where the velocity is asked for, `[B, C, H, W]`.
    pub x_t: Tensor,
    /// At which time, `[B]`.
    pub t: Tensor,
    /// Advantages, `[B]`.
    pub advantage: Tensor,
    /// What lies on the other side.
    pub target: Target,
}

/// What a training point was made from.
pub enum Target {
    /// A sample and noise: `x_t = (1 - t) x0 + t eps`.
    Forward {
        /// The sample, `[B, C, H, W]`.
        x0: Tensor,
        /// The noise, `[B, C, H, W]`.
        eps: Tensor,
    },
    /// A step of a stochastic rollout from `x_t`: `next ~ N(x_factor x_t + v_factor v, std^2)`.
    Reverse {
        /// Where it went, `[B, C, H, W]`.
        next: Tensor,
        /// Log-probability of going there, mean over dimensions, when it was sampled, `[B]`.
        log_prob: Tensor,
        /// Factor of the state, `[B]`.
        x_factor: Tensor,
        /// Factor of the velocity, `[B]`.
        v_factor: Tensor,
        /// Standard deviation, `[B]`.
        std: Tensor,
        /// Noise rate, `[B]`.
        rate: Tensor,
    },
}

impl Point {
    /// u = eps - x0 of a point of the forward process, `[B, C, H, W]`.
    fn target_velocity(&self) -> Result<Tensor> {
        let (x0, eps) = self.forward()?;
        Ok((eps - x0)?)
    }

    /// (x0, eps) of a point of the forward process.
    fn forward(&self) -> Result<(&Tensor, &Tensor)> {
        match &self.target {
            Target::Forward { x0, eps } => Ok((x0, eps)),
            Target::Reverse { .. } => {
                Err(Error::Failed("the objective needs samples and noise, not rollout steps".into()))
            }
        }
    }
}

/// The frozen velocities of a micro-batch, those that the objective needs.
pub struct Frozen {
    /// Of the old policy, `[B, C, H, W]`.
    pub old: Option<Tensor>,
    /// Of the base model, `[B, C, H, W]`.
    pub reference: Option<Tensor>,
}

/// The losses of a micro-batch, a value a sample.
pub struct Terms {
    /// What is minimised, `[B]`.
    pub loss: Tensor,
    /// Its part from the rewards, `[B]`.
    pub policy: Tensor,
    /// Its part from the distance to the base model, `[B]`.
    pub kl: Tensor,
}

/// An objective, ready to be computed.
#[derive(Debug, Clone, PartialEq)]
pub enum Objective {
    /// FlowAWR.
    FlowAwr(flow_awr::FlowAwr),
    /// AdvantageFlow.
    AdvantageFlow(advantage_flow::AdvantageFlow),
    /// DiffusionNFT.
    DiffusionNft(diffusion_nft::DiffusionNft),
    /// Flow-GRPO.
    FlowGrpo(flow_grpo::FlowGrpo),
    /// Advantage weighted matching.
    Awm(awm::Awm),
}

impl Objective {
    /// The objective of a configuration, for advantages of this map.
    pub fn new(config: &MethodConfig, map: &AdvantageMap) -> Self {
        let kl_coef = |default: f64| config.kl_coef.unwrap_or(default);
        let adaptive = config.adaptive_scale.unwrap_or(true);
        match config.name {
            Method::FlowAwr => Self::FlowAwr(flow_awr::FlowAwr {
                loss: config.form().loss(config.gamma),
                kl_coef: kl_coef(1e-4),
                adaptive: config.adaptive_scale.unwrap_or(config.form() != Form::Paper),
            }),
            Method::AdvantageFlow => Self::AdvantageFlow(advantage_flow::AdvantageFlow {
                gamma: config.gamma.unwrap_or(Gamma::OneMinusAdvantage),
                kl_coef: kl_coef(1e-3),
                kl_space: config.kl_space.unwrap_or(KlSpace::Velocity),
                adaptive,
            }),
            Method::DiffusionNft => Self::DiffusionNft(diffusion_nft::DiffusionNft {
                mix: config.mix.unwrap_or(1.0),
                clip: map.bound(),
                kl_coef: kl_coef(1e-4),
                adaptive,
            }),
            Method::FlowGrpo => Self::FlowGrpo(flow_grpo::FlowGrpo {
                ratio_clip: config.ratio_clip.unwrap_or(1e-4),
                kl_coef: kl_coef(0.04),
            }),
            Method::Awm => Self::Awm(awm::Awm {
                ratio_clip: config.ratio_clip.unwrap_or(1.0),
                anchor: config.anchor.unwrap_or(1.0),
                clip: map.bound(),
                kl_coef: kl_coef(1e-4),
            }),
        }
    }

    /// What it asks for.
    pub fn needs(&self) -> Needs {
        let forward =
            |old: bool, kl_coef: f64| Needs { old, reference: kl_coef > 0.0, trajectory: false, on_policy: false };
        match self {
            Self::FlowAwr(o) => forward(true, o.kl_coef),
            Self::AdvantageFlow(o) => forward(true, o.kl_coef),
            Self::DiffusionNft(o) => forward(true, o.kl_coef),
            Self::Awm(o) => Needs { on_policy: true, ..forward(o.anchor > 0.0, o.kl_coef) },
            Self::FlowGrpo(o) => Needs { trajectory: true, on_policy: true, ..forward(false, o.kl_coef) },
        }
    }

    /// The losses at the policy's velocity `v` `[B, C, H, W]`.
    pub fn terms(&self, point: &Point, v: &Tensor, frozen: &Frozen) -> Result<Terms> {
        match self {
            Self::FlowAwr(o) => o.terms(point, v, frozen),
            Self::AdvantageFlow(o) => o.terms(point, v, frozen),
            Self::DiffusionNft(o) => o.terms(point, v, frozen),
            Self::FlowGrpo(o) => o.terms(point, v, frozen),
            Self::Awm(o) => o.terms(point, v, frozen),
        }
    }
}

impl Terms {
    /// The sum of the part from the rewards and the distance to the base model, `[B]` each.
    fn new(policy: Tensor, kl: Tensor) -> Result<Self> {
        Ok(Self { loss: (&policy + &kl)?, policy, kl })
    }
}

impl Frozen {
    /// The old policy's velocity, which configuration has promised.
    fn old(&self) -> Result<&Tensor> {
        promised(&self.old, "old policy's")
    }

    /// The base model's.
    fn reference(&self) -> Result<&Tensor> {
        promised(&self.reference, "base model's")
    }

    /// `kl_coef mean (v - v_ref)^2`, `[B]`; without the base model's velocity where it does not count.
    fn kl(&self, v: &Tensor, kl_coef: f64) -> Result<Tensor> {
        match kl_coef > 0.0 {
            true => Ok((distance(v, self.reference()?)?.square * kl_coef)?),
            false => Ok(Tensor::zeros(v.dim(0)?, v.dtype(), v.device())?),
        }
    }
}

fn promised<'a>(v: &'a Option<Tensor>, name: &str) -> Result<&'a Tensor> {
    v.as_ref().ok_or_else(|| Error::Failed(format!("the objective needs the {name} velocity, which is absent")))
}

/// What the adaptive scale is at least.
const LEAST_SCALE: f64 = 1e-5;

/// The adaptive scale `max(mean |f - x0|, 1e-5)`, `[B]`, outside the graph (DiffusionNFT, scripts/train_nft_sd3.py at
/// 24af555), of the deviation of f's velocity from u; 1 where it is switched off.
fn adaptive_scale(point: &Point, from_target: &Measured, adaptive: bool) -> Result<Tensor> {
    match adaptive {
        true => Ok((from_target.magnitude.detach() * &point.t)?.maximum(LEAST_SCALE)?),
        false => Ok(point.t.ones_like()?),
    }
}

#[cfg(test)]
mod tests;
