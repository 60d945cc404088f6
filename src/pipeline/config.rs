//! `[model]`: which base model, where its files are, and what of it is trained.

use super::{BaseFiles, BaseModel, Kind};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::params::{LoraConfig, Precision, Trainable};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// `[model]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Which base model.
    pub kind: Kind,
    /// Its files; nothing: the weights that are part of the program (glyphs only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Another transformer than the one in `path`: its folder or file, or the authors' single file
    /// (sd35).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transformer: Option<PathBuf>,
    /// Side of a picture in pixels (sd35; a glyphs picture has its own).
    pub resolution: usize,
    /// Tokens of a prompt that T5 reads (sd35); CLIP reads 77.
    pub t5_tokens: usize,
    /// The folder of encoded prompts (sd35), which runs may share.
    pub prompt_cache: PathBuf,
    /// What it computes in.
    pub dtype: Precision,
    /// What pictures are decoded in (sd35); nothing: as `dtype` on a GPU, f32 on a CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae_dtype: Option<Precision>,
    /// What is trained.
    pub trainable: Trainable,
    /// The adapters, if they are what is trained.
    pub lora: LoraSection,
}

/// `[model.lora]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSection {
    /// Rank of the update.
    pub rank: usize,
    /// Scale: the update is multiplied by alpha / rank.
    pub alpha: f64,
    /// The linear layers that get an adapter, by the end of their name (`attn.to_q`); nothing: the
    /// model's usual ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Vec<String>>,
    /// A LoRA to start from, as PEFT or diffusers write it; nothing: random ones (sd35).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

impl Default for LoraSection {
    fn default() -> Self {
        Self { rank: 32, alpha: 64.0, targets: None, path: None }
    }
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            kind: Kind::default(),
            path: None,
            transformer: None,
            resolution: 512,
            t5_tokens: 128,
            prompt_cache: "cache/prompts".into(),
            dtype: Precision::default(),
            vae_dtype: None,
            trainable: Trainable::Full,
            lora: LoraSection::default(),
        }
    }
}

impl ModelConfig {
    /// The adapters, if they are what is trained.
    pub fn adapters(&self) -> Option<LoraConfig> {
        let LoraSection { rank, alpha, targets, path: _ } = &self.lora;
        let usual = || self.kind.lora_targets().iter().map(|t| t.to_string()).collect();
        let targets = targets.clone().unwrap_or_else(usual);
        (self.trainable == Trainable::Lora).then_some(LoraConfig { rank: *rank, alpha: *alpha, targets })
    }

    /// Where the transformer's files are.
    pub fn transformer(&self) -> Option<&Path> {
        self.transformer.as_deref().or(self.path.as_deref())
    }

    /// The keys that only other base models read, each once.
    pub fn without_effect(&self) -> Vec<&'static str> {
        let own = self.kind.keys();
        let others: BTreeSet<&str> = Kind::all().flat_map(|kind| kind.keys()).copied().collect();
        others.into_iter().filter(|key| !own.contains(key)).collect()
    }

    /// Refuses values that cannot be meant: those of its base model's keys, and any of a key
    /// without a default that only other ones have.
    ///
    /// # Errors
    /// One line: key, value, remedy.
    pub fn check(&self) -> std::result::Result<(), String> {
        let [given, usual] = [self, &Self::default()].map(Table::try_from);
        let (given, usual) = (given.map_err(|e| e.to_string())?, usual.map_err(|e| e.to_string())?);
        for key in self.without_effect() {
            if let (Some(value), None) = (lookup(&given, key), lookup(&usual, key)) {
                let owners = Kind::all().filter(|kind| kind.keys().contains(&key));
                let owners: Vec<_> = owners.map(|kind| kind.name()).collect();
                return Err(format!(
                    "{key} = {value}: belongs to {}; remove it or set model.kind = {:?}",
                    owners.join(", "),
                    owners[0]
                ));
            }
        }
        self.kind.check(self)
    }

    /// The base model, whose own the files are if they can be read.
    ///
    /// # Errors
    /// [`Error::Usage`]: they are those of another one.
    pub(super) fn base(&self) -> Result<&dyn BaseModel> {
        let Some(path) = self.transformer() else { return Ok(&*self.kind) };
        match Kind::of_files(path).filter(|kind| *kind != self.kind) {
            None => Ok(&*self.kind),
            Some(other) => Err(Error::Usage(format!(
                "model.kind = {:?}: the weights in {} are of {other:?}; set model.kind = {:?}, or name other files",
                self.kind.name(),
                path.display(),
                other.name()
            ))),
        }
    }

    /// [`BaseModel::check_files`].
    pub fn check_files(&self) -> Result<()> {
        self.base()?.check_files(self)
    }

    /// [`BaseModel::build`].
    pub fn build(&self) -> Result<Model> {
        self.base()?.build(self)
    }

    /// [`BaseModel::flops`].
    pub fn flops(&self) -> Result<f64> {
        self.base()?.flops(self)
    }

    /// [`BaseModel::image_tokens`].
    pub fn tokens(&self) -> Result<usize> {
        self.base()?.image_tokens(self)
    }

    /// [`BaseModel::open`].
    pub fn open(&self) -> Result<BaseFiles> {
        self.base()?.open(self)
    }
}

/// The value of a key `model.KEY` or `model.SECTION.KEY` in the table of `[model]`.
fn lookup<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    let mut parts = key.split('.').skip(1);
    let first = table.get(parts.next()?)?;
    parts.try_fold(first, |value, part| value.get(part))
}

/// Refuses the path that `key` names where there is nothing.
pub(crate) fn is_there(key: &str, path: &Path, remedy: &str) -> Result<()> {
    match path.exists() {
        true => Ok(()),
        false => Err(Error::Usage(format!(
            "{key} = {path:?}: there is nothing at this path; {remedy}, or name another place with --set {key}=PATH"
        ))),
    }
}
