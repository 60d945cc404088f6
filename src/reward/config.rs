//! `[[reward]]`: which rewards there are, and what a configuration says of them.

use super::clip::{AestheticConfig, ClipScoreConfig, HpsConfig, PickScoreConfig};
use super::colour::ColourConfig;
use super::jpeg::{CompressibilityConfig, IncompressibilityConfig};
use super::ocr::OcrConfig;
use super::remote::RemoteConfig;
use super::shapes::{ShapesConfig, ShapesStrictConfig};
use super::sharpness::SharpnessConfig;
use super::{Fit, Loader, Reward};
use crate::data::Prompt;
use crate::variants::{self, Common, variants};
use serde::de::MapAccess;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::path::Path;

/// What the file of a reward says of it. Its configuration implements this: a struct of its keys with their defaults.
pub trait RewardSpec {
    /// Refuses values that cannot be; `name` is the reward's, `deadline_s` is how long peers wait for a rank.
    ///
    /// # Errors
    /// One line: key, value, remedy.
    fn check(&self, _name: &str, _deadline_s: u64) -> Result<(), String> {
        Ok(())
    }

    /// Refuses files and variables that are not there; a plan needs none of them.
    ///
    /// # Errors
    /// One line: key, value, remedy.
    fn check_files(&self) -> Result<(), String> {
        Ok(())
    }

    /// The keys that name files to be read: in a configuration file, from that file's folder.
    fn files(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether it applies to a prompt, as far as that can be said before there is a picture; needs none of its files.
    fn fit(&self, _prompt: &Prompt) -> Fit {
        Fit::Yes
    }

    /// Its name in the metrics, where that is not the `name` of the configuration.
    fn label<'a>(&'a self, name: &'a str) -> &'a str {
        name
    }

    /// The keys that change no score: where a server is and how it is asked.
    fn not_deciding(&self) -> &'static [&'static str] {
        &[]
    }

    /// The reward, of a configuration that is checked.
    ///
    /// # Errors
    /// What of its files cannot be read.
    fn build(&self, loader: &Loader) -> crate::Result<Box<dyn Reward>>;
}

variants! {
    /// Which rewards there are.
    kinds RewardKind;
    /// A reward with its own keys.
    variants RewardSettings of dyn RewardSpec;
    remedy |_owner: &str| "remove it here".to_owned();
    /// Is the text in the prompt's double quotes read? 0 to 1.
    "ocr" => Ocr(OcrConfig),
    /// Are ink and ground of a glyph prompt right? 0, 0.5 or 1.
    "colour" => Colour(ColourConfig),
    /// Minus the kB of the picture as a JPEG file (DDPO).
    "jpeg-compressibility" => JpegCompressibility(CompressibilityConfig),
    /// The kB of the picture as a JPEG file (DDPO).
    "jpeg-incompressibility" => JpegIncompressibility(IncompressibilityConfig),
    /// How many facts of a prompt of shapes does the picture show? 0 to 1.
    "shapes" => Shapes(ShapesConfig),
    /// Does it show all of them? 0 or 1.
    "shapes-strict" => ShapesStrict(ShapesStrictConfig),
    /// How steep are the edges, whatever the prompt? 0 to 1.
    "sharpness" => Sharpness(SharpnessConfig),
    /// How well picture and prompt agree, by a model of the CLIP family.
    "clip-score" => ClipScore(ClipScoreConfig),
    /// PickScore / 26.
    "pick-score" => PickScore(PickScoreConfig),
    /// HPS v2.1.
    "hps" => Hps(HpsConfig),
    /// LAION's aesthetic predictor, roughly 1 to 10.
    "aesthetic" => Aesthetic(AestheticConfig),
    /// What a server says.
    "remote" => Remote(RemoteConfig),
}

/// One `[[reward]]` of the configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardConfig {
    /// What its score is multiplied by before the scores are summed.
    pub weight: f64,
    /// Which reward, and its own keys.
    pub settings: RewardSettings,
}

/// The key of every reward.
#[derive(Serialize)]
struct Weight {
    weight: f64,
}

impl Default for Weight {
    fn default() -> Self {
        Self { weight: 1.0 }
    }
}

impl Common for Weight {
    const KEYS: &'static [&'static str] = &["weight"];

    fn read<'de, A: MapAccess<'de>>(&mut self, _key: &str, map: &mut A) -> Result<(), A::Error> {
        self.weight = map.next_value()?;
        Ok(())
    }
}

impl<'de> Deserialize<'de> for RewardConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (settings, Weight { weight }) = variants::read(deserializer)?;
        Ok(Self { weight, settings })
    }
}

impl Serialize for RewardConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        variants::write(&self.settings, &Weight { weight: self.weight }, serializer)
    }
}

impl RewardConfig {
    /// A reward of weight 1 with the defaults of its keys.
    pub fn new(kind: RewardKind) -> Self {
        Self::with(RewardSettings::of(kind))
    }

    /// A reward of weight 1 with these keys.
    pub fn with(settings: impl Into<RewardSettings>) -> Self {
        Self { weight: Weight::default().weight, settings: settings.into() }
    }

    /// Which reward it is.
    pub fn kind(&self) -> RewardKind {
        self.settings.kind()
    }

    /// Its name in the metrics.
    pub fn label(&self) -> &str {
        self.settings.label(self.kind().name())
    }

    /// [`RewardSpec::fit`].
    pub fn fit(&self, prompt: &Prompt) -> Fit {
        self.settings.fit(prompt)
    }

    /// Whether everything that the reward needs is said, and can be.
    ///
    /// # Errors
    /// One line: key, value, remedy. `deadline_s` is how long peers wait for a rank.
    pub fn check(&self, deadline_s: u64) -> Result<(), String> {
        if !self.weight.is_finite() {
            return Err(format!("weight = {}: must be a finite number, such as 1.0", self.weight));
        }
        self.settings.check(self.kind().name(), deadline_s)
    }
}

/// What a reward says that lacks a key.
pub(super) fn lacks(name: &str, key: &str, what: &str) -> String {
    format!("name = {name:?}: needs {key}, {what}; add it")
}

/// Refuses the path of a key where there is nothing.
pub(super) fn is_there(key: &str, path: &Path, remedy: &str) -> Result<(), String> {
    match path.exists() {
        true => Ok(()),
        false => Err(format!("{key} = {path:?}: there is nothing at this path; {remedy}")),
    }
}
