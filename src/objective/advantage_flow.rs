//! AdvantageFlow: signed regression to the sample, held by the old policy and the base model.

use super::{Frozen, Point, Terms, adaptive_scale, distance, estimate};
use crate::error::Result;
use candle_core::Tensor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The weight gamma of the distance from the old policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gamma {
    /// `1 - A`: every sample has the curvature 1 + kl.
    OneMinusAdvantage,
    /// A number above the largest -A: the published one is 1.1, for advantages within 1.
    Constant(f64),
}

/// `A |f - x0|^2 + gamma |f - f_old|^2 + kl |f - f_ref|^2` in x0 estimates, means over dimensions, all divided by
/// `w = max(mean |f - x0|, 1e-5)` (arXiv 2605.26013; the loss as quoted by arXiv 2609.37670, equation 2).
#[derive(Debug, Clone, PartialEq)]
pub struct AdvantageFlow {
    /// Rollout regularisation.
    pub gamma: Gamma,
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
    /// Whether the loss is divided by w.
    pub adaptive: bool,
}

impl AdvantageFlow {
    pub(super) fn terms(&self, point: &Point, v: &Tensor, frozen: &Frozen) -> Result<Terms> {
        let f = estimate(point, v)?; // [B, C, H, W]
        let scale = adaptive_scale(point.forward()?.0, &f, self.adaptive)?;
        let policy = (anchored(point, &f, frozen.old()?, self.gamma)? / &scale)?;
        Terms::with_kl(policy, self.kl_coef, || Ok((distance(&f, &estimate(point, frozen.reference()?)?)? / scale)?))
    }
}

/// `A |f - x0|^2 + gamma |f - f_old|^2`, means over dimensions: `[B]`.
pub(super) fn anchored(point: &Point, f: &Tensor, old: &Tensor, gamma: Gamma) -> Result<Tensor> {
    let a = &point.advantage; // [B]
    let gamma = match gamma {
        Gamma::OneMinusAdvantage => a.affine(-1.0, 1.0)?,
        Gamma::Constant(gamma) => a.affine(0.0, gamma)?,
    };
    let (x0, _) = point.forward()?;
    Ok(((distance(f, x0)? * a)? + (distance(f, &estimate(point, old)?)? * gamma)?)?)
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
