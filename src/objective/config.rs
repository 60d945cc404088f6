//! `[method]` and `[advantage]`: which methods there are, and what a configuration says of them.

use super::MethodSpec;
use super::advantage_flow::AdvantageFlowConfig;
use super::awm::AwmConfig;
use super::diffusion_nft::DiffusionNftConfig;
use super::flow_awr::FlowAwrConfig;
use super::flow_grpo::FlowGrpoConfig;
use super::pepg::PepgConfig;
use crate::advantage::{AdvantageMap, Aggregate, Map, Normaliser};
use crate::checks::{Check, positive, positive_or_inf};
use crate::variants::{self, NoCommon, variants};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

variants! {
    /// The methods.
    kinds Method;
    /// `[method]`: a method with its own keys.
    variants MethodConfig of dyn MethodSpec;
    remedy |owner: &str| format!("remove it or set method.name = {owner:?}");
    /// FlowAWR (arXiv 2606.30376).
    "flow-awr" => FlowAwr(FlowAwrConfig),
    /// AdvantageFlow (arXiv 2605.26013).
    "advantage-flow" => AdvantageFlow(AdvantageFlowConfig),
    /// DiffusionNFT (arXiv 2509.16117).
    "diffusion-nft" => DiffusionNft(DiffusionNftConfig),
    /// Flow-GRPO (arXiv 2505.05470); takes `sampler.solver = "sde"`.
    "flow-grpo" => FlowGrpo(FlowGrpoConfig),
    /// Advantage weighted matching (arXiv 2509.25050).
    "awm" => Awm(AwmConfig),
    /// PEPG (Choi et al., ICML 2026).
    "pepg" => Pepg(PepgConfig),
}

impl Default for MethodConfig {
    fn default() -> Self {
        Self::of(Method::FlowAwr)
    }
}

impl<'de> Deserialize<'de> for MethodConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        variants::read::<_, NoCommon, _>(deserializer).map(|(method, _)| method)
    }
}

impl Serialize for MethodConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        variants::write(self, &NoCommon {}, serializer)
    }
}

/// `[advantage]`: rewards to advantages; left out, the keys are the method's own (flow-awr's are
/// shown).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvantageConfig {
    /// Several rewards: "sum" of the weighted scores, or of the "normalised" ones (MixGRPO).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aggregate: Option<Aggregate>,
    /// Scale: "global-std" and "group-std" (+ 1e-4), or "pooled-rms" (advantage-flow's).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normaliser: Option<Normaliser>,
    /// Bound of the normalised reward, inf for none; advantage-flow: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// "linear" (all but flow-awr), "softmax" (model rewards), "gated-softmax" (rules: ocr),
    /// "tempered-softmax" (flow-awr's robust variant).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map: Option<Map>,
    /// Temperature of the softmax maps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Bound of a softmax map's advantage, inf for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map_clip: Option<f64>,
}

impl AdvantageConfig {
    /// The method's map with these differences.
    pub fn resolve(&self, method: &MethodConfig) -> AdvantageMap {
        let default = method.map();
        AdvantageMap {
            aggregate: self.aggregate.unwrap_or(default.aggregate),
            normaliser: self.normaliser.unwrap_or(default.normaliser),
            clip: self.clip.unwrap_or(default.clip),
            map: self.map.unwrap_or(default.map),
            temperature: self.temperature.unwrap_or(default.temperature),
            map_clip: self.map_clip.unwrap_or(default.map_clip),
        }
    }

    /// Says every key of a map that has an effect: the linear one has no temperature and no bound but `clip`.
    pub fn of(map: &AdvantageMap) -> Self {
        let softmax = map.map != Map::Linear;
        Self {
            aggregate: Some(map.aggregate),
            normaliser: Some(map.normaliser),
            clip: Some(map.clip),
            map: Some(map.map),
            temperature: softmax.then_some(map.temperature),
            map_clip: softmax.then_some(map.map_clip),
        }
    }

    /// Refuses values that cannot be.
    ///
    /// # Errors
    /// One line: key, value, remedy.
    pub fn check(&self) -> Check {
        let bound = |key, value: Option<f64>| value.map_or(Ok(()), |value| positive_or_inf(key, value));
        bound("advantage.clip", self.clip)?;
        bound("advantage.map_clip", self.map_clip)?;
        self.temperature.map_or(Ok(()), |value| positive("advantage.temperature", value))
    }
}
