//! LoRA adapters as our own parameters.

use super::find::ADAPTERS;
use super::lora_names::{self, Renamed};
use super::peft::Peft;
use super::{Format, Weights};
use crate::error::{Error, Result};
use crate::fs;
use crate::params::{Layout, LoraConfig};
use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// PEFT's configuration beside its file.
const CONFIG: &str = "adapter_config.json";

/// The key under which diffusers (from 0.34) keeps PEFT's configuration in the header of its file.
const METADATA: &str = "lora_adapter_metadata";

/// An adapter, opened and not read.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The factors by the names of the modules: `*.lora_A.weight` `[rank, in]` and `*.lora_B.weight` `[out, rank]`.
    pub weights: Weights,
    /// The layout of the file.
    pub format: Format,
    /// Rank of the update.
    pub rank: usize,
    /// Of each module, sorted: the update is this times B A.
    pub scales: BTreeMap<String, f64>,
}

impl Adapter {
    /// Opens PEFT's folder (`adapter_config.json` and one safetensors file, whatever it is called) or the file in it, or
    /// diffusers' `pytorch_lora_weights.safetensors` or its folder, or a file with kohya's or ComfyUI's names. A module without
    /// a word about alpha has the scale 1, as diffusers, kohya and ComfyUI read it; by PEFT's names that is refused.
    ///
    /// # Errors
    /// Nothing of this kind is there; a tensor is no factor of the transformer's, or is not used; the adapter is more than
    /// two factors and a scale for each module, or has several ranks.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open(path)?;
        if !lora_names::is_adapter(&file) {
            return Err(file.error("holds no *.lora_A.weight; give a LoRA of PEFT, diffusers, kohya or ComfyUI"));
        }
        let Renamed { factors: weights, alphas } = lora_names::renamed(&file)?;
        let config = config_of(path, &file, !alphas.is_empty())?;
        if config.is_some() && !alphas.is_empty() {
            return Err(file.error("has an alpha in its configuration and others among its tensors; keep one of them"));
        }
        let ranks = ranks(&weights)?;
        let Some(&rank) = ranks.values().next() else {
            return Err(file.error("holds no factor of a LoRA"));
        };
        if let Some((module, other)) = ranks.iter().find(|(_, other)| **other != rank) {
            return Err(file.error(format!(
                "has rank {rank} and, at {module}, rank {other}; adapters of one rank are supported: save it again with one, \
                 or merge it into its model and give that as model.transformer"
            )));
        }
        if let Some(module) = alphas.keys().find(|module| !ranks.contains_key(*module)) {
            return Err(file.error(format!("has an alpha of {module} and no factors of it; it is damaged")));
        }
        let mut scales = BTreeMap::new();
        for module in ranks.into_keys() {
            let scale = match &config {
                Some(config) if config.rank(&module) != Some(rank as u64) => {
                    let said = config.rank(&module).map_or("no number".into(), |rank| rank.to_string());
                    let message =
                        format!("is of rank {rank}, its configuration says {said} for {module}; it is damaged");
                    return Err(file.error(message));
                }
                Some(config) => config.scale(&module, rank),
                None => alphas.get(&module).map_or(1.0, |alpha| alpha / rank as f64),
            };
            scales.insert(module, scale);
        }
        Ok(Self { weights, format: lora_names::format(&file), rank, scales })
    }

    /// What B A is multiplied by, where that is the same for all modules.
    pub fn scale(&self) -> Option<f64> {
        let mut scales = self.scales.values();
        let first = scales.next().copied();
        first.filter(|first| scales.all(|scale| scale == first))
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
        let parts = layout.entries.iter().map(|e| {
            let tensor = self.weights.tensor(&e.name, DType::F32, device)?.flatten_all()?;
            let scale = e.name.strip_suffix(B).and_then(|module| self.scales.get(module));
            let factor = scale.map_or(1.0, |scale| scale * lora.rank as f64 / lora.alpha);
            Ok(if factor != 1.0 { (tensor * factor)? } else { tensor })
        });
        Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// The modules that the adapter stands beside, sorted.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.scales.keys().map(String::as_str)
    }
}

/// Ends of the factors' names.
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// The rank of each module's factors.
///
/// # Errors
/// A factor is alone, of no matrix's shape, or of a type that is no weight's; two do not belong together.
fn ranks(weights: &Weights) -> Result<BTreeMap<String, usize>> {
    let mut ranks = BTreeMap::new();
    for name in weights.names() {
        if let Some(problem) = weights.unreadable(name) {
            return Err(weights.error(format!("{name} {problem}")));
        }
        let Some(module) = name.strip_suffix(A).or_else(|| name.strip_suffix(B)) else {
            return Err(weights.error(format!("holds {name}, which is no factor of a LoRA")));
        };
        let [a, b] = [A, B].map(|end| format!("{module}{end}"));
        if let Some(absent) = [&a, &b].into_iter().find(|factor| !weights.contains(factor)) {
            return Err(weights.error(format!("lacks {absent}, the other factor of {name}; it is damaged")));
        }
        match (weights.shape(&a), weights.shape(&b)) {
            (Some(&[rank, _]), Some(&[_, columns])) if rank == columns && rank > 0 => ranks.insert(module.into(), rank),
            (a, b) => {
                let message =
                    format!("has factors of {module} of shapes {a:?} and {b:?}, not [rank, in] and [out, rank]");
                return Err(weights.error(message));
            }
        };
    }
    Ok(ranks)
}

/// The file of an adapter.
fn open(path: &Path) -> Result<Weights> {
    let named = ADAPTERS.map(|name| path.join(name)).into_iter().filter(|file| fs::is_named(file)).collect::<Vec<_>>();
    match named.as_slice() {
        [] => Weights::open(path),
        [one] => Weights::open(one),
        [first, second, ..] => {
            let message =
                format!("holds two adapters, {} and {}; name the one that is meant", first.display(), second.display());
            Err(Error::File { path: path.to_path_buf(), message })
        }
    }
}

/// PEFT's configuration: beside the file, or in the header of diffusers' file.
///
/// # Errors
/// There is none although the names are PEFT's, which has alpha nowhere else, and no tensor `says_alpha`; there are two; or
/// one is not understood.
fn config_of(path: &Path, weights: &Weights, says_alpha: bool) -> Result<Option<Peft>> {
    let is_peft = lora_names::format(weights) == Format::PeftAdapter
        || weights.path().file_name().is_some_and(|name| name == ADAPTERS[0]);
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
    let file = folder.join(CONFIG);
    // Beside one file of many it may be another's, unless it is PEFT's.
    let is_its_own = (is_peft || path.is_dir()) && fs::is_named(&file);
    let beside = if is_its_own { Some(beside(file)?) } else { None };
    match (beside, in_header(weights)?) {
        (Some(beside), Some(inside)) if beside != inside => {
            Err(weights.error(format!("has one configuration in its header and another in {CONFIG}; keep one of them")))
        }
        (None, None) if is_peft && !says_alpha => {
            Err(weights.error(format!("has no {CONFIG} beside it, which says its alpha; download it as well")))
        }
        (beside, inside) => Ok(beside.or(inside)),
    }
}

fn beside(file: PathBuf) -> Result<Peft> {
    let text = fs::read_to_string(&file)?;
    let config = serde_json::from_str(&text).map_err(|e| format!("is not a valid configuration of PEFT: {e}"));
    config.and_then(|config| Peft::of(&config)).map_err(|message| Error::File { path: file, message })
}

fn in_header(weights: &Weights) -> Result<Option<Peft>> {
    let Some(text) = weights.metadata(METADATA) else { return Ok(None) };
    let problem = |e: String| weights.error(format!("{METADATA} in its header {e}"));
    let all: Map<String, Value> =
        serde_json::from_str(text).map_err(|e| problem(format!("is not a valid configuration of PEFT: {e}")))?;
    // A pipeline puts the component before each key; the transformer's own `save_lora_adapter` does not.
    let of_transformer =
        |(key, value): (&String, &Value)| Some((key.strip_prefix("transformer.")?.into(), value.clone()));
    let own: Map<String, Value> =
        if all.contains_key("r") { all } else { all.iter().filter_map(of_transformer).collect() };
    match own.is_empty() {
        true => Ok(None), // of other components only
        false => Peft::of(&own).map(Some).map_err(problem),
    }
}
