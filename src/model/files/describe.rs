//! What `inspect` shows of a model's files.

use super::{Adapter, Format, Part, Transformer, Weights, parts};
use crate::error::Result;
use crate::model::mmdit::Config;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// What lies at a path. Shows as a table; serialises.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// The path.
    pub path: PathBuf,
    /// The layout in a few words.
    pub format: &'static str,
    /// The parts, those of a pipeline that are missing too.
    pub parts: Vec<PartDescription>,
    /// Sizes of the transformer, where there is one that fits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transformer: Option<Config>,
    /// `model.kind` of a transformer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// Digest of the transformer's weights, as checkpoints name their base model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_digest: Option<String>,
    /// Of an adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterDescription>,
}

/// A part of a model.
#[derive(Debug, Clone, Serialize)]
pub struct PartDescription {
    /// Its name.
    pub name: String,
    /// Tensors.
    pub tensors: usize,
    /// Their elements.
    pub parameters: usize,
    /// Tensors of each type.
    pub dtypes: BTreeMap<String, usize>,
    /// Bytes of the tensors.
    pub bytes: usize,
    /// Other weights in its folder that are not read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub passed_over: Vec<PathBuf>,
    /// What is missing or wrong.
    pub problem: Option<String>,
}

/// An adapter.
#[derive(Debug, Clone, Serialize)]
pub struct AdapterDescription {
    /// Rank.
    pub rank: usize,
    /// The update is this times B A: alpha / rank. None where it is not the same for all modules.
    pub scale: Option<f64>,
    /// Modules.
    pub modules: usize,
    /// The ends of the modules' names.
    pub targets: Vec<String>,
}

/// Describes a model's files: a pipeline, a transformer, a single file, an adapter. What its loaders refuse is a problem of
/// the part; values are looked through for such that are not finite only if `values` says so, since it reads every byte.
///
/// # Errors
/// The path is of no known layout, or an adapter cannot be used.
pub fn describe(path: &Path, values: bool) -> Result<Description> {
    let (format, parts) = parts(path)?;
    let scanned = |weights: &Weights| if values { weights.scan() } else { Ok(()) };
    let problem = |part: &Part| {
        let problem = part.problem.clone();
        problem.or_else(|| Some(part.weights.as_ref().map(scanned)?.err()?.to_string()))
    };
    let mut parts: Vec<_> = parts.iter().map(|p| part(&p.name, p.weights.as_ref(), problem(p))).collect();
    let (mut transformer, mut base_digest, mut adapter) = (None, None, None);
    match format {
        Format::Embedded(_) => base_digest = Some(Weights::open(path)?.digest()),
        Format::Pipeline | Format::Transformer | Format::SingleFile => match Transformer::open(path) {
            Ok(found) => {
                base_digest = Some(found.weights.digest());
                transformer = Some(found.config);
            }
            Err(e) => {
                if let Some(part) = parts.iter_mut().find(|p| p.name == "transformer" && p.problem.is_none()) {
                    part.problem = Some(e.to_string());
                }
            }
        },
        _ => adapter = Some(described(&Adapter::open(path)?)),
    }
    let kind = transformer.as_ref().and_then(Config::release).map(|release| release.kind);
    let (path, format) = (path.to_path_buf(), format.describe());
    Ok(Description { path, format, parts, transformer, kind, base_digest, adapter })
}

fn part(name: &str, weights: Option<&Weights>, problem: Option<String>) -> PartDescription {
    let mut dtypes = BTreeMap::new();
    for name in weights.into_iter().flat_map(Weights::names) {
        let dtype = weights.and_then(|weights| weights.stored_type(name));
        *dtypes.entry(dtype.unwrap_or_default()).or_insert(0) += 1;
    }
    PartDescription {
        name: name.to_owned(),
        tensors: weights.map_or(0, |w| w.names().count()),
        parameters: weights.map_or(0, Weights::elements),
        dtypes,
        bytes: weights.map_or(0, Weights::bytes),
        passed_over: weights.into_iter().flat_map(Weights::passed_over).map(Path::to_path_buf).collect(),
        problem,
    }
}

fn described(adapter: &Adapter) -> AdapterDescription {
    let mut targets: Vec<_> = adapter.modules().map(target).collect();
    targets.sort();
    targets.dedup();
    let (rank, scale) = (adapter.rank, adapter.scale());
    AdapterDescription { rank, scale, modules: adapter.modules().count(), targets }
}

/// The name of a module within its block.
fn target(module: &str) -> String {
    let in_block = module.strip_prefix("transformer_blocks.").and_then(|rest| rest.split_once('.'));
    in_block.map_or(module, |(_, name)| name).to_owned()
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "path         {}", self.path.display())?;
        writeln!(f, "layout       {}", self.format)?;
        if let Some(config) = &self.transformer {
            let (layers, heads, dim) = (config.num_layers, config.num_attention_heads, config.attention_head_dim);
            let dual = config.dual_attention_layers.len();
            writeln!(f, "transformer  {layers} blocks ({dual} with a second attention), {heads} heads of {dim}")?;
        }
        if let Some(kind) = self.kind {
            writeln!(f, "model.kind   {kind}")?;
        }
        if let Some(adapter) = &self.adapter {
            let AdapterDescription { rank, scale, modules, targets } = adapter;
            let scale = scale.map_or("of its own for each module".into(), |scale| scale.to_string());
            writeln!(f, "adapter      rank {rank}, scale {scale}, {modules} modules: {}", targets.join(" "))?;
        }
        if let Some(digest) = &self.base_digest {
            writeln!(f, "base model   {digest}")?;
        }
        writeln!(f, "\n{:<16} {:>7} {:>14} {:>10}  {:<16} state", "part", "tensors", "parameters", "MiB", "types")?;
        for part in &self.parts {
            let types: Vec<_> = part.dtypes.iter().map(|(dtype, count)| format!("{dtype} x {count}")).collect();
            let (tensors, parameters, mib) = (part.tensors, part.parameters, part.bytes as f64 / (1 << 20) as f64);
            let (types, state) = (types.join(" "), part.problem.as_deref().unwrap_or("whole"));
            writeln!(f, "{:<16} {tensors:>7} {parameters:>14} {mib:>10.1}  {types:<16} {state}", part.name)?;
        }
        for part in &self.parts {
            for other in &part.passed_over {
                let (name, other) = (&part.name, other.display());
                writeln!(f, "{name}: {other} lies beside what is read, holds something else and is not read")?;
            }
        }
        Ok(())
    }
}
