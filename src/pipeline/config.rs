//! `[model]`: which base model, where its files are, and what of it is trained.

use super::{BaseFiles, BaseModel, Kind};
use crate::checks::{Check, count, positive};
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
    /// Base model: "glyphs" or "shapes", the embedded tasks' transformers in pixel space; "sd35-medium",
    /// "sd35-large", "sd3-medium": Stable Diffusion 3.5 Medium and Large and 3 Medium, or smaller
    /// models of their architectures.
    pub kind: Kind,
    /// glyphs, shapes: weights (safetensors) instead of those that are part of the program. sd35: the
    /// folder as diffusers writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// sd35: another transformer than that folder's: a folder or file of diffusers, or the authors'
    /// single file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transformer: Option<PathBuf>,
    /// sd35: side of a picture, pixels.
    pub resolution: usize,
    /// sd35: tokens of a prompt that T5 reads (DiffusionNFT: 128; diffusers: 256); CLIP reads 77.
    pub t5_tokens: usize,
    /// sd35: folder of encoded prompts; runs and ranks share it.
    pub prompt_cache: PathBuf,
    /// What weights and activations are: "f32" or "bf16"; adapters, master weights and the
    /// optimizer are f32 in either.
    pub dtype: Precision,
    /// sd35: what pictures are decoded in, "f32" or "bf16"; left out: as dtype on a GPU, f32 on a
    /// CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae_dtype: Option<Precision>,
    /// "full": every weight of the base model; "lora": adapters beside it.
    pub trainable: Trainable,
    /// The adapters, if they are what is trained.
    pub lora: LoraSection,
}

/// `[model.lora]`: counts if `trainable = "lora"` (arXiv 2106.09685).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSection {
    /// Rank of the update.
    pub rank: usize,
    /// Scale: the update is multiplied by alpha / rank.
    pub alpha: f64,
    /// Layers that get an adapter, by the end of their name; left out: glyphs, shapes: attn.to_q, to_k,
    /// to_v, to_out.0, ff.net.0.proj, ff.net.2; sd35: DiffusionNFT's, all of attn.*, none of
    /// attn2.*.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Vec<String>>,
    /// sd35: a LoRA to start from, of PEFT, diffusers or kohya, or with ComfyUI's names; left out:
    /// random A, zero B.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

impl Default for LoraSection {
    fn default() -> Self {
        Self { rank: 32, alpha: 64.0, targets: None, path: None }
    }
}

impl LoraSection {
    /// Refuses adapters that cannot be; `known` layers can have one.
    fn check(&self, known: &[&str]) -> Check {
        count("model.lora.rank", self.rank)?;
        positive("model.lora.alpha", self.alpha)?;
        let Some(targets) = &self.targets else { return Ok(()) };
        let known_names = known.join(", ");
        if targets.is_empty() {
            return Err(format!("model.lora.targets = []: nothing would be trained; choose from {known_names}"));
        }
        match targets.iter().find(|target| !known.contains(&target.as_str())) {
            Some(odd) => {
                Err(format!("model.lora.targets = [{odd:?}]: no layer is called that; choose from {known_names}"))
            }
            None => Ok(()),
        }
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
    pub fn check(&self) -> Check {
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
        self.kind.check(self)?;
        match self.trainable {
            Trainable::Lora => self.lora.check(self.kind.lora_targets()),
            Trainable::Full => Ok(()),
        }
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
