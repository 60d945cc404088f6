//! The whole model with the update in its weights.

use super::file::{self, Planned};
use super::parts::TRANSFORMER;
use super::{Base, Options, Trained};
use crate::error::{Error, Result};
use crate::params::{Role, Spec};
use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

/// File of the embedded task's model.
const GLYPHS: &str = "base.safetensors";

/// Name of the weights in the folder of a transformer, without its end.
const WEIGHTS: &str = "diffusion_pytorch_model";

/// Writes the model into the folder `out`, with the other parts of its pipeline unless `options` leave them out, and returns
/// the names of its files.
pub(super) fn write(trained: &Trained, base: &Base, out: &Path, options: &Options) -> Result<Vec<String>> {
    let mut files = weights(trained, base, out, options)?;
    if let Some(parts) = base.parts(options) {
        files.extend(parts.copy(out)?);
    }
    Ok(files)
}

/// Writes what was trained.
fn weights(trained: &Trained, base: &Base, out: &Path, options: &Options) -> Result<Vec<String>> {
    let specs = base.model.specs();
    let mut specs: Vec<&Spec> =
        specs.iter().flat_map(|specs| specs.iter()).filter(|spec| spec.role != Role::Adapter).collect();
    specs.sort_by(|a, b| a.name.cmp(&b.name));
    let planned = specs.iter().map(|spec| {
        let stored = || base.weights.dtype(&spec.name);
        let dtype = options.dtype.or_else(stored).unwrap_or(DType::F32);
        Planned { name: spec.name.clone(), dtype, shape: spec.shape.clone() }
    });
    let planned: Vec<_> = planned.collect();
    let tensor = |planned: &Planned| merged(trained, base, planned);
    let Some(config) = &base.transformer else {
        file::write(&out.join(GLYPHS), &planned, tensor)?;
        return Ok(vec![GLYPHS.into()]);
    };
    let folder = out.join(TRANSFORMER);
    fs::create_dir(&folder).map_err(Error::io(&folder))?;
    file::write_json(&folder.join("config.json"), &config.to_json())?;
    let mut names = vec!["config.json".to_owned()];
    let shards = shards(&planned, options.shard_bytes);
    if let [one] = shards.as_slice() {
        names.push(format!("{WEIGHTS}.safetensors"));
        file::write(&folder.join(&names[1]), one, tensor)?;
    } else {
        let mut places = Map::new();
        for (index, shard) in shards.iter().enumerate() {
            let name = format!("{WEIGHTS}-{:05}-of-{:05}.safetensors", index + 1, shards.len());
            file::write(&folder.join(&name), shard, tensor)?;
            places.extend(shard.iter().map(|planned| (planned.name.clone(), Value::from(name.as_str()))));
            names.push(name);
        }
        let size: usize = planned.iter().map(Planned::bytes).sum();
        names.push(format!("{WEIGHTS}.safetensors.index.json"));
        let index = json!({ "metadata": { "total_size": size }, "weight_map": places });
        file::write_json(&folder.join(&names[names.len() - 1]), &index)?;
    }
    Ok(names.into_iter().map(|name| format!("{TRANSFORMER}/{name}")).collect())
}

/// Groups of tensors, in order, of at most `limit` bytes; a larger tensor is alone.
fn shards(planned: &[Planned], limit: usize) -> Vec<&[Planned]> {
    let (mut shards, mut start, mut length) = (Vec::new(), 0, 0);
    for (index, bytes) in planned.iter().map(Planned::bytes).enumerate() {
        if index > start && length + bytes > limit {
            shards.push(&planned[start..index]);
            (start, length) = (index, 0);
        }
        length += bytes;
    }
    shards.push(&planned[start..]);
    shards
}

/// A tensor of the model with the update in it, f32: `W + alpha / rank * B A`, or the trained `W` itself.
fn merged(trained: &Trained, base: &Base, planned: &Planned) -> Result<Tensor> {
    if let Some(entry) = trained.find(&planned.name) {
        return trained.value(entry);
    }
    let weight = base.weights.tensor(&planned.name, DType::F32, &Device::Cpu)?;
    let factor = |factor: &str| trained.find(&format!("{}.{factor}.weight", planned.name.strip_suffix(".weight")?));
    match (&trained.lora, factor("lora_A"), factor("lora_B")) {
        (Some(lora), Some(a), Some(b)) => {
            let update = trained.value(b)?.matmul(&trained.value(a)?)?; // [out, in]
            Ok((weight + (update * (lora.alpha / lora.rank as f64))?)?)
        }
        _ => Ok(weight),
    }
}
