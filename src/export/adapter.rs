//! The adapter alone.

use super::Trained;
use super::file::{self, Planned};
use crate::error::{Error, Result};
use crate::params::{Entry, LoraConfig, is_end_of};
use candle_core::DType;
use serde_json::{Value, json};
use std::path::Path;

/// How an adapter is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Diffusers,
    Peft,
}

/// File of diffusers.
const DIFFUSERS: &str = "pytorch_lora_weights.safetensors";

/// File of PEFT.
const PEFT: &str = "adapter_model.safetensors";

/// PEFT's configuration beside it.
const PEFT_CONFIG: &str = "adapter_config.json";

/// Writes the adapter into the folder `out` and returns the names of its files.
pub(super) fn write(trained: &Trained, out: &Path, style: Style, dtype: DType) -> Result<Vec<String>> {
    let lora = adapters(trained)?;
    let (name, prefix, factor) = match style {
        Style::Diffusers => (DIFFUSERS, "transformer.", lora.alpha / lora.rank as f64),
        Style::Peft => (PEFT, "base_model.model.", 1.0),
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
    if style == Style::Diffusers {
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

/// What is told of a run that trained the whole model.
pub fn no_adapter() -> Error {
    Error::Usage("this run trained the whole model, there is no adapter; take --format merged".into())
}

/// The adapters that were trained, whose configuration is as the parameters say.
fn adapters(trained: &Trained) -> Result<&LoraConfig> {
    let lora = trained.lora.as_ref().ok_or_else(no_adapter)?;
    let other = |what: String| {
        let remedy = "give the configuration that the checkpoint was trained with";
        Err(Error::Usage(format!("model.lora: {what}; {remedy}")))
    };
    let mut wanted: Vec<&String> = lora.targets.iter().collect();
    for Entry { name, shape, .. } in &trained.layout.entries {
        let (module, rank) = match (name.strip_suffix(".lora_A.weight"), name.strip_suffix(".lora_B.weight")) {
            (Some(module), _) => (module, shape.first()),
            (_, Some(module)) => (module, shape.last()),
            _ => return other(format!("the checkpoint holds {name}, which is no adapter")),
        };
        if rank != Some(&lora.rank) {
            return other(format!("rank = {}, but the checkpoint's {name} is {shape:?}", lora.rank));
        }
        if !lora.wants(module) {
            return other(format!(
                "the checkpoint has an adapter for {module}, which targets = {:?} leave out",
                lora.targets
            ));
        }
        wanted.retain(|target| !is_end_of(target, module));
    }
    match wanted.first() {
        None => Ok(lora),
        Some(target) => other(format!("targets has {target:?}, for which the checkpoint has no adapter")),
    }
}
