//! LoRA adapters of PEFT and of diffusers.

use super::Weights;
use crate::error::Result;
use std::path::Path;

/// The tensors of an adapter by the names of the modules: `*.lora_A.weight` and `*.lora_B.weight`.
pub(super) fn weights(path: &Path) -> Result<Weights> {
    let named = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"].map(|name| path.join(name));
    let weights = Weights::open(named.iter().find(|file| file.is_file()).map_or(path, |file| file.as_path()))?;
    for prefix in ["base_model.model.", "transformer."] {
        let inside = weights.under(prefix);
        if inside.names().next().is_some() {
            return Ok(inside);
        }
    }
    Ok(weights)
}
