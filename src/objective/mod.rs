//! Objectives: pure arithmetic on velocities. One file a method; `docs/METHODS.md` has them in one notation.

mod advantage_flow;
mod flow_awr;

pub use advantage_flow::Gamma;

use crate::advantage::{AdvantageMap, Map, Normaliser};
use crate::error::Result;
use crate::flow::x0_estimate;
use candle_core::{D, DType, Tensor};
use serde::{Deserialize, Serialize};

/// The methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// FlowAWR (arXiv 2606.30376).
    FlowAwr,
    /// AdvantageFlow (arXiv 2605.26013).
    AdvantageFlow,
}

/// `[method]`: the method's name and its own keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MethodConfig {
    /// The method.
    pub name: Method,
    /// Weight of the distance from the base model; nothing: the method's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_coef: Option<f64>,
    /// Rollout regularisation of AdvantageFlow: `"1-A"` or a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gamma: Option<Gamma>,
    /// Whether the loss is divided by the mean distance of the x0 estimate from x0.
    #[serde(default = "yes")]
    pub adaptive_scale: bool,
}

fn yes() -> bool {
    true
}

impl Default for MethodConfig {
    fn default() -> Self {
        Self { name: Method::FlowAwr, kl_coef: None, gamma: None, adaptive_scale: true }
    }
}

/// `[advantage]`: what differs from the method's own map.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvantageConfig {
    /// The scale of a reward.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normaliser: Option<Normaliser>,
    /// Bound of the normalised reward.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// The map: `linear`, `softmax` (soft gating) or `gated-softmax` (hard gating).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map: Option<Map>,
    /// Temperature of the softmax maps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Bound of a softmax map's advantage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map_clip: Option<f64>,
}

impl AdvantageConfig {
    /// The method's map with these differences.
    pub fn resolve(&self, method: Method) -> AdvantageMap {
        let default = match method {
            Method::FlowAwr => AdvantageMap::FLOW_AWR,
            Method::AdvantageFlow => AdvantageMap::ADVANTAGE_FLOW,
        };
        AdvantageMap {
            normaliser: self.normaliser.unwrap_or(default.normaliser),
            clip: self.clip.unwrap_or(default.clip),
            map: self.map.unwrap_or(default.map),
            temperature: self.temperature.unwrap_or(default.temperature),
            map_clip: self.map_clip.unwrap_or(default.map_clip),
        }
    }
}

/// What an objective asks for beside the policy's velocity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// The old policy's velocity.
    pub old: bool,
    /// The base model's velocity.
    pub reference: bool,
}

/// One micro-batch of training points.
pub struct Point {
    /// Samples, `[B, C, H, W]`.
    pub x0: Tensor,
    /// Noise, `[B, C, H, W]`.
    pub eps: Tensor,
    /// Times, `[B]`.
    pub t: Tensor,
    /// `(1 - t) x0 + t eps`, `[B, C, H, W]`.
    pub x_t: Tensor,
    /// Advantages, `[B]`.
    pub advantage: Tensor,
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
}

impl Objective {
    /// The objective of a configuration.
    pub fn new(config: &MethodConfig) -> Self {
        let adaptive = config.adaptive_scale;
        match config.name {
            Method::FlowAwr => Self::FlowAwr(flow_awr::FlowAwr { kl_coef: config.kl_coef.unwrap_or(1e-4), adaptive }),
            Method::AdvantageFlow => Self::AdvantageFlow(advantage_flow::AdvantageFlow {
                gamma: config.gamma.unwrap_or(Gamma::OneMinusAdvantage),
                kl_coef: config.kl_coef.unwrap_or(1e-3),
                adaptive,
            }),
        }
    }

    /// What it asks for.
    pub fn needs(&self) -> Needs {
        let kl_coef = match self {
            Self::FlowAwr(o) => o.kl_coef,
            Self::AdvantageFlow(o) => o.kl_coef,
        };
        Needs { old: true, reference: kl_coef > 0.0 }
    }

    /// The losses at the policy's velocity `v` `[B, C, H, W]`.
    pub fn terms(&self, point: &Point, v: &Tensor, frozen: &Frozen) -> Result<Terms> {
        match self {
            Self::FlowAwr(o) => o.terms(point, v, frozen),
            Self::AdvantageFlow(o) => o.terms(point, v, frozen),
        }
    }
}

/// Mean over all but the first dimension: `[B, ..] -> [B]`.
fn mean_dims(x: &Tensor) -> Result<Tensor> {
    Ok(x.flatten_from(1)?.mean(D::Minus1)?)
}

/// Squared distance of two tensors, mean over dimensions: `[B]`.
fn distance(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    mean_dims(&(a - b)?.sqr()?)
}

/// The adaptive scale `max(mean |f - x0|, 1e-5)`, `[B]`, summed in f64, outside the graph
/// (DiffusionNFT, scripts/train_nft_sd3.py at 24af555); 1 where it is switched off.
fn adaptive_scale(point: &Point, f: &Tensor, adaptive: bool) -> Result<Tensor> {
    if !adaptive {
        return Ok(point.t.ones_like()?.to_dtype(f.dtype())?);
    }
    let wide = (f.detach().to_dtype(DType::F64)? - point.x0.to_dtype(DType::F64)?)?.abs()?;
    Ok(mean_dims(&wide)?.maximum(1e-5)?.to_dtype(f.dtype())?)
}

/// A velocity that configuration has promised.
fn promised<'a>(v: &'a Option<Tensor>, name: &str) -> Result<&'a Tensor> {
    v.as_ref().ok_or_else(|| crate::Error::Failed(format!("the objective needs the {name} velocity, which is absent")))
}

/// The x0 estimate of a velocity at the point.
fn estimate(point: &Point, v: &Tensor) -> Result<Tensor> {
    x0_estimate(&point.x_t, &point.t, v)
}

#[cfg(test)]
mod tests;
