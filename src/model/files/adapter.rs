//! LoRA adapters of PEFT and of diffusers as our own parameters.

use super::Weights;
use crate::error::{Error, Result};
use crate::files;
use crate::params::{Layout, LoraConfig};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// File names in an adapter's folder: of PEFT, of diffusers.
const FILES: [&str; 2] = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"];

/// PEFT's configuration beside its file.
const CONFIG: &str = "adapter_config.json";

/// The key under which diffusers (from 0.34) keeps PEFT's configuration in the header of its file.
const METADATA: &str = "lora_adapter_metadata";

/// What may stand before the modules' names: of PEFT, of diffusers.
const PREFIXES: [&str; 2] = ["base_model.model.", "transformer."];

/// An adapter, opened and not read.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The factors by the names of the modules: `*.lora_A.weight` `[rank, in]` and `*.lora_B.weight` `[out, rank]`.
    pub weights: Weights,
    /// Rank of the update.
    pub rank: usize,
    /// The update is this times B A.
    pub scale: f64,
}

/// PEFT's words, those that change the function; what is not listed does not, or is checked by the tensors' names.
#[derive(Debug, Deserialize)]
struct Config {
    peft_type: Option<String>,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: Option<bool>,
    #[serde(default)]
    use_dora: Option<bool>,
    #[serde(default)]
    fan_in_fan_out: Option<bool>,
    #[serde(default)]
    rank_pattern: Option<Map<String, Value>>,
    #[serde(default)]
    alpha_pattern: Option<Map<String, Value>>,
}

impl Adapter {
    /// Opens PEFT's folder (`adapter_config.json`, `adapter_model.safetensors`), or diffusers'
    /// `pytorch_lora_weights.safetensors` or its folder. A file without a word about alpha has the scale 1, as diffusers
    /// reads it.
    ///
    /// # Errors
    /// Nothing of this kind is there, or the adapter is more than two factors with one scale.
    pub fn open(path: &Path) -> Result<Self> {
        let weights = open(path)?;
        let rank = weights.names().find(|name| name.ends_with(".lora_A.weight")).and_then(|name| weights.shape(name));
        let Some(&[rank, _]) = rank else {
            return Err(weights.error("holds no *.lora_A.weight; give a LoRA of PEFT or of diffusers"));
        };
        let config = match config_of(path, &weights)? {
            None => return Ok(Self { weights, rank, scale: 1.0 }),
            Some(config) => config,
        };
        let patterned = |pattern: &Option<Map<String, Value>>| pattern.as_ref().is_some_and(|p| !p.is_empty());
        let unsupported = [
            ("peft_type", config.peft_type.as_deref().is_some_and(|kind| kind != "LORA")),
            ("use_dora", config.use_dora == Some(true)),
            ("fan_in_fan_out", config.fan_in_fan_out == Some(true)),
            ("rank_pattern", patterned(&config.rank_pattern)),
            ("alpha_pattern", patterned(&config.alpha_pattern)),
        ];
        if let Some((key, _)) = unsupported.iter().find(|(_, unsupported)| *unsupported) {
            return Err(
                weights.error(format!("has {key}, which is not supported; give a plain LoRA, one rank and alpha"))
            );
        }
        if config.r != rank {
            return Err(weights.error(format!("is of rank {rank}, its configuration says {}; it is damaged", config.r)));
        }
        let divisor = if config.use_rslora == Some(true) { (rank as f64).sqrt() } else { rank as f64 };
        Ok(Self { weights, rank, scale: config.lora_alpha / divisor })
    }

    /// The adapter as the trainable parameters of `layout` `[total]`, f32, for a model built with `lora`. Where that has
    /// another alpha / rank, B is multiplied so that the update stays what it was.
    ///
    /// # Errors
    /// Another rank or other modules; all are listed.
    pub fn flat(&self, layout: &Layout, lora: &LoraConfig, device: &Device) -> Result<Tensor> {
        if self.rank != lora.rank {
            let (rank, wanted) = (self.rank, lora.rank);
            return Err(self.weights.error(format!(
                "is of rank {rank}, model.lora.rank is {wanted}; set model.lora.rank = {rank}, and alpha and targets to match"
            )));
        }
        let expected = layout.entries.iter().map(|e| (e.name.as_str(), e.shape.as_slice()));
        self.weights.check(expected, |_| false).map_err(|e| match e {
            Error::File { path, message } => {
                Error::File { path, message: format!("{message} model.lora.targets must name its modules, no others") }
            }
            other => other,
        })?;
        let factor = self.scale * lora.rank as f64 / lora.alpha;
        let parts = layout.entries.iter().map(|e| {
            let tensor = self.weights.tensor(&e.name, DType::F32, device)?.flatten_all()?;
            Ok(if e.name.ends_with(".lora_B.weight") && factor != 1.0 { (tensor * factor)? } else { tensor })
        });
        Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// The modules that the adapter stands beside, sorted.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.weights.names().filter_map(|name| name.strip_suffix(".lora_A.weight"))
    }
}

/// The tensors of an adapter by the names of the modules.
fn open(path: &Path) -> Result<Weights> {
    let named = FILES.map(|name| path.join(name));
    let weights = Weights::open(named.iter().find(|file| file.is_file()).map_or(path, PathBuf::as_path))?;
    let prefix = PREFIXES.into_iter().find(|prefix| weights.names().any(|name| name.starts_with(prefix)));
    Ok(prefix.map_or_else(|| weights.clone(), |prefix| weights.under(prefix)))
}

/// PEFT's configuration: beside its file, or in the header of diffusers' file.
fn config_of(path: &Path, weights: &Weights) -> Result<Option<Config>> {
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
    let file = folder.join(CONFIG);
    let is_peft = weights.path().file_name().is_some_and(|name| name == FILES[0]);
    if is_peft && file.is_file() {
        let text = files::read_to_string(&file)?;
        let message = |e| format!("is no configuration of PEFT: {e}");
        let config = serde_json::from_str(&text).map_err(|e| Error::File { path: file, message: message(e) })?;
        return Ok(Some(config));
    }
    if is_peft {
        return Err(weights.error(format!("has no {CONFIG} beside it, which says its alpha; download it as well")));
    }
    let Some(text) = weights.metadata(METADATA) else { return Ok(None) };
    let problem = |e| weights.error(format!("has {METADATA} that cannot be read: {e}"));
    let all: Map<String, Value> = serde_json::from_str(text).map_err(problem)?;
    // A pipeline puts the component before each key; the transformer's own `save_lora_adapter` does not.
    let of_transformer =
        |(key, value): (&String, &Value)| Some((key.strip_prefix("transformer.")?.into(), value.clone()));
    let own: Map<String, Value> =
        if all.contains_key("r") { all } else { all.iter().filter_map(of_transformer).collect() };
    if own.is_empty() {
        return Ok(None); // of other components only
    }
    serde_json::from_value(own.into()).map(Some).map_err(problem)
}
