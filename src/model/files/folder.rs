//! What lies at a path: a pipeline of diffusers with its parts, a transformer alone, the authors' single file, an adapter.

use super::{Adapter, Weights, find, sai};
use crate::error::{Error, Result};
use crate::files;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The layouts that files of a model come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A folder with `model_index.json` and a folder for every part.
    Pipeline,
    /// Weights by diffusers' names of the transformer alone, with or without its `config.json`.
    Transformer,
    /// The authors' single file, with or without the VAE.
    SingleFile,
    /// Weights of the embedded task's model.
    Glyphs,
    /// An adapter of PEFT: `adapter_config.json` and `adapter_model.safetensors`.
    PeftAdapter,
    /// An adapter of diffusers: `pytorch_lora_weights.safetensors`.
    DiffusersAdapter,
}

/// File of a pipeline that names its parts.
const INDEX: &str = "model_index.json";

/// The parts of a Stable Diffusion 3 pipeline.
const PARTS: [&str; 9] = [
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "scheduler",
];

impl Format {
    /// The layout of what lies at `path`.
    ///
    /// # Errors
    /// There is nothing that can be read, or it is of no known layout.
    pub fn of(path: &Path) -> Result<Self> {
        if path.join(INDEX).is_file() || path.join("transformer").is_dir() {
            return Ok(Self::Pipeline);
        }
        if path.join("adapter_config.json").is_file() {
            return Ok(Self::PeftAdapter);
        }
        let weights = Weights::open(path)?;
        let has = |name: &str| weights.contains(name);
        if weights.names().any(|name| name.contains(".lora_A.")) {
            let peft = weights.names().any(|name| name.starts_with("base_model.model."));
            return Ok(if peft { Self::PeftAdapter } else { Self::DiffusersAdapter });
        }
        if has("context_embedder.characters") {
            return Ok(Self::Glyphs);
        }
        if sai::transformer(&weights)?.is_some() {
            return Ok(Self::SingleFile);
        }
        if has("pos_embed.proj.weight") && has("context_embedder.weight") {
            return Ok(Self::Transformer);
        }
        let first = weights.names().next().unwrap_or("no tensor").to_owned();
        Err(weights.error(format!(
            "is of no layout that is known here (it begins with {first}); give a diffusers folder of Stable Diffusion \
             3.5 Medium, its sd3.5_medium.safetensors, or a LoRA"
        )))
    }

    /// The layout in a few words.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Pipeline => "diffusers pipeline",
            Self::Transformer => "diffusers transformer",
            Self::SingleFile => "single file by its authors' names",
            Self::Glyphs => "glyphs base model",
            Self::PeftAdapter => "PEFT adapter",
            Self::DiffusersAdapter => "diffusers LoRA",
        }
    }
}

/// A part of what lies at a path.
#[derive(Debug)]
pub struct Part {
    /// Its name, as the folder of a pipeline is called.
    pub name: String,
    /// Its tensors, by diffusers' names; none for a part without weights.
    pub weights: Option<Weights>,
    /// What is absent or cannot be read.
    pub problem: Option<String>,
}

/// The parts of what lies at `path`, those of a pipeline that are missing too. Parts that `model_index.json` sets to
/// null are not missing.
///
/// # Errors
/// As [`Format::of`].
pub fn parts(path: &Path) -> Result<(Format, Vec<Part>)> {
    let format = Format::of(path)?;
    let whole = |name: &str, weights: Weights| Part { name: name.into(), weights: Some(weights), problem: None };
    let parts = match format {
        Format::Pipeline => pipeline(path)?,
        Format::Transformer | Format::Glyphs => vec![whole("transformer", Weights::open(path)?)],
        Format::SingleFile => {
            let weights = Weights::open(path)?;
            let of = [("transformer", sai::transformer(&weights)?), ("vae", sai::vae(&weights)?)];
            of.into_iter().filter_map(|(name, weights)| Some(whole(name, weights?))).collect()
        }
        Format::PeftAdapter | Format::DiffusersAdapter => vec![whole("adapter", Adapter::open(path)?.weights)],
    };
    Ok((format, parts))
}

/// The parts of a pipeline's folder.
fn pipeline(folder: &Path) -> Result<Vec<Part>> {
    let path = folder.join(INDEX);
    let index: Option<Map<String, Value>> = match path.is_file() {
        true => {
            let text = files::read_to_string(&path)?;
            let message = |e| format!("is no index of a pipeline ({e}); download it again");
            Some(serde_json::from_str(&text).map_err(|e| Error::File { path: path.clone(), message: message(e) })?)
        }
        false => None,
    };
    let mut parts: Vec<Part> = PARTS
        .into_iter()
        .filter(|&name| index.as_ref().is_none_or(|index| index.get(name).is_some_and(is_wanted)))
        .map(|name| part(folder.join(name), name))
        .collect();
    if index.is_none() {
        parts.push(Part { name: INDEX.into(), weights: None, problem: Some("is absent".into()) });
    }
    Ok(parts)
}

/// Whether an entry of the index, `[library, class]`, names a class.
fn is_wanted(entry: &Value) -> bool {
    entry.get(1).is_some_and(|class| !class.is_null())
}

fn part(folder: PathBuf, name: &str) -> Part {
    let (weights, problem) = if !folder.is_dir() {
        (None, Some("is absent".to_owned()))
    } else if name.starts_with("tokenizer") {
        let any = ["tokenizer.json", "vocab.json", "spiece.model"].iter().any(|file| folder.join(file).is_file());
        (None, (!any).then(|| "has none of tokenizer.json, vocab.json, spiece.model".to_owned()))
    } else if name == "scheduler" {
        let there = folder.join("scheduler_config.json").is_file();
        (None, (!there).then(|| "has no scheduler_config.json".to_owned()))
    } else {
        match Weights::open(&folder) {
            Err(e) => (None, Some(e.to_string())),
            Ok(weights) => {
                let there = folder.join("config.json").is_file();
                (Some(weights), (!there).then(|| "has no config.json".to_owned()))
            }
        }
    };
    Part { name: name.to_owned(), weights, problem }
}

/// The weights of the part `name` of what lies at `path`: a pipeline's folder, the authors' single file (transformer and
/// VAE only), or the part's own folder or file. By diffusers' names.
///
/// # Errors
/// The part is not there, or cannot be read.
pub fn open_part(path: &Path, name: &str) -> Result<Weights> {
    if path.join(INDEX).is_file() || path.join(name).is_dir() {
        let folder = path.join(name);
        if !folder.is_dir() {
            let there: Vec<_> = find::names(path)?.into_iter().filter(|entry| path.join(entry).is_dir()).collect();
            let message = format!("has no folder {name}, only {there:?}; download the pipeline with all its folders");
            return Err(Error::File { path: path.to_path_buf(), message });
        }
        return Weights::open(&folder);
    }
    let weights = Weights::open(path)?;
    let renamed = match name {
        "transformer" => sai::transformer(&weights)?,
        "vae" => sai::vae(&weights)?,
        _ => None,
    };
    Ok(renamed.unwrap_or(weights))
}
