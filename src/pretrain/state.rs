//! The state of an unfinished pretraining, from which it goes on.

use super::PretrainConfig;
use crate::comm::World;
use crate::error::{Error, Result};
use crate::fs;
use crate::optim::Sharded;
use crate::params::Layout;
use candle_core::{Device, Tensor, safetensors::load_buffer};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Where the state lies: beside the weights.
pub(super) fn path(config: &PretrainConfig) -> PathBuf {
    config.out.with_extension("state")
}

/// Writes the whole state; rank 0 does. Collective.
pub(super) fn save(config: &PretrainConfig, state: &Sharded, world: &World) -> Result<()> {
    let vectors = state.gather_all(&*world.device)?;
    if world.rank() == 0 {
        let update = Tensor::new(&[state.update as u32], &Device::Cpu)?;
        let tensors = vectors.into_iter().chain([("update".to_owned(), update)]);
        let bytes = safetensors::serialize(tensors, None)
            .map_err(|e| Error::Failed(format!("the state cannot be encoded: {e}")))?;
        fs::write(&path(config), &bytes)?;
    }
    world.host.barrier()
}

/// Takes the state that an earlier pretraining left, if it left one.
///
/// # Errors
/// The file cannot be read, or is of another model.
pub(super) fn restore(config: &PretrainConfig, layout: &Layout, state: &mut Sharded) -> Result<()> {
    let path = path(config);
    if !path.exists() {
        return Ok(());
    }
    let wrong = |message: String| Error::File { path: path.clone(), message };
    let mut tensors = load_buffer(&fs::read(&path)?, &Device::Cpu).map_err(|e| wrong(e.to_string()))?;
    let update = tensors.remove("update").ok_or_else(|| wrong("has no update; remove it".into()))?;
    let update = update.to_vec1::<u32>()?.first().copied().unwrap_or(0);
    let total: usize = layout.entries.iter().map(|entry| entry.len).sum();
    let held = state.held();
    let mut vectors = BTreeMap::new();
    for (name, whole) in tensors {
        let whole = whole.to_vec1::<f32>()?;
        if whole.len() != total {
            let message =
                format!("is of another model: {} parameters, not {total}; remove it, or name another out", whole.len());
            return Err(wrong(message));
        }
        let parts: Vec<&[f32]> = held.iter().map(|range| &whole[range.clone()]).collect();
        vectors.insert(name, parts.concat());
    }
    state.restore(vectors, update.into())
}
