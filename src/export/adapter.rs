//! The adapter alone.

use super::file::{self, Planned};
use super::{Format, Trained};
use crate::error::{Error, Result};
use candle_core::DType;
use serde_json::{Value, json};
use std::path::Path;

/// File of diffusers.
pub const DIFFUSERS: &str = "pytorch_lora_weights.safetensors";

/// File of PEFT.
pub const PEFT: &str = "adapter_model.safetensors";

/// PEFT's configuration beside it.
pub const PEFT_CONFIG: &str = "adapter_config.json";

/// Writes the adapter into the folder `out` and returns the names of its files.
pub fn write(trained: &Trained, out: &Path, format: Format, dtype: DType) -> Result<Vec<String>> {
    let Some(lora) = &trained.lora else {
        return Err(Error::Usage("this run trained the whole model, there is no adapter; take --format merged".into()));
    };
    let (name, prefix, factor) = match format {
        Format::Diffusers => (DIFFUSERS, "transformer.", lora.alpha / lora.rank as f64),
        Format::Peft | Format::Merged => (PEFT, "base_model.model.", 1.0),
    };
    let mut entries: Vec<_> = trained.layout.entries.iter().collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let planned: Vec<_> = entries
        .iter()
        .map(|e| Planned { name: format!("{prefix}{}", e.name), dtype, shape: e.shape.clone() })
        .collect();
    let mut entries = entries.into_iter();
    file::write(&out.join(name), &planned, |_| {
        let entry = entries.next().ok_or_else(|| Error::Failed("an adapter ended early".into()))?;
        let value = trained.value(entry)?;
        Ok(if entry.name.ends_with(".lora_B.weight") && factor != 1.0 { (value * factor)? } else { value })
    })?;
    if format == Format::Diffusers {
        return Ok(vec![name.into()]);
    }
    // Whole numbers as PEFT writes them.
    let alpha: Value = if lora.alpha.fract() == 0.0 { json!(lora.alpha as i64) } else { json!(lora.alpha) };
    let config = json!({
        "peft_type": "LORA",
        "task_type": null,
        "base_model_name_or_path": null,
        "inference_mode": true,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "target_modules": lora.targets,
    });
    file::write_json(&out.join(PEFT_CONFIG), &config)?;
    Ok(vec![PEFT_CONFIG.into(), name.into()])
}
