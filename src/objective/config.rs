//! What a configuration says about the method and its advantages.

use super::{Form, Gamma, KlSpace};
use crate::advantage::{AdvantageMap, Aggregate, Map, Normaliser};
use serde::{Deserialize, Serialize};

/// The methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// FlowAWR (arXiv 2606.30376).
    FlowAwr,
    /// AdvantageFlow (arXiv 2605.26013).
    AdvantageFlow,
    /// DiffusionNFT (arXiv 2509.16117).
    DiffusionNft,
    /// Flow-GRPO (arXiv 2505.05470).
    FlowGrpo,
    /// Advantage weighted matching (arXiv 2509.25050).
    Awm,
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
    /// What AdvantageFlow's distance from the base model is measured in; nothing: `velocity`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_space: Option<KlSpace>,
    /// FlowAWR's form; nothing: `released`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<Form>,
    /// Rollout regularisation of AdvantageFlow and of FlowAWR's robust form: `"1-A"` or a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gamma: Option<Gamma>,
    /// DiffusionNFT's distance of its two velocities from the old one (its paper's beta).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mix: Option<f64>,
    /// How far the ratio of Flow-GRPO and AWM may leave 1 before its gradient is cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio_clip: Option<f64>,
    /// AWM's weight of the distance from its slow copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anchor: Option<f64>,
    /// Whether the loss of FlowAWR, AdvantageFlow and DiffusionNFT is divided by the mean distance of the x0 estimate
    /// from x0; nothing: yes, but for FlowAWR's form `paper`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adaptive_scale: Option<bool>,
}

impl MethodConfig {
    /// The method with its defaults.
    pub fn of(name: Method) -> Self {
        Self {
            name,
            kl_coef: None,
            kl_space: None,
            form: None,
            gamma: None,
            mix: None,
            ratio_clip: None,
            anchor: None,
            adaptive_scale: None,
        }
    }

    /// FlowAWR's form.
    pub(super) fn form(&self) -> Form {
        self.form.unwrap_or(Form::Released)
    }
}

impl Default for MethodConfig {
    fn default() -> Self {
        Self::of(Method::FlowAwr)
    }
}

/// `[advantage]`: what differs from the method's own map.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvantageConfig {
    /// How several rewards become one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aggregate: Option<Aggregate>,
    /// The scale of a reward.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normaliser: Option<Normaliser>,
    /// Bound of the normalised reward.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// The map.
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
    pub fn resolve(&self, method: &MethodConfig) -> AdvantageMap {
        let default = match (method.name, method.form()) {
            (Method::FlowAwr, Form::Released) => AdvantageMap::FLOW_AWR,
            (Method::FlowAwr, Form::Paper | Form::Exact) => AdvantageMap::FLOW_AWR_PAPER,
            (Method::FlowAwr, Form::Robust) => AdvantageMap::ROBUST,
            (Method::AdvantageFlow, _) => AdvantageMap::ADVANTAGE_FLOW,
            (Method::DiffusionNft | Method::FlowGrpo | Method::Awm, _) => AdvantageMap::DIFFUSION_NFT,
        };
        AdvantageMap {
            aggregate: self.aggregate.unwrap_or(default.aggregate),
            normaliser: self.normaliser.unwrap_or(default.normaliser),
            clip: self.clip.unwrap_or(default.clip),
            map: self.map.unwrap_or(default.map),
            temperature: self.temperature.unwrap_or(default.temperature),
            map_clip: self.map_clip.unwrap_or(default.map_clip),
        }
    }
}
