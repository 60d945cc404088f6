//! `flowrl-dist inspect`.

use super::print;
use crate::checkpoint;
use crate::error::{EXIT_DONE, Error, Result};
use crate::model::files;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// What is looked at.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  flowrl-dist inspect runs/glyphs/checkpoints/update_00000050\n  \
    flowrl-dist inspect models/stable-diffusion-3.5-medium\n  \
    flowrl-dist inspect sd3.5_medium.safetensors --json")]
pub struct Arguments {
    /// A checkpoint's folder; or a model: a diffusers folder, a safetensors file, a LoRA of PEFT or diffusers
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Verifies every checksum of a checkpoint, or the headers of a model's files, then prints.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let path = arguments.path.as_path();
    if is_checkpoint(path) {
        show(&checkpoint::describe(path)?, arguments.json)
    } else {
        show(&files::describe(path).map_err(not_a_checkpoint)?, arguments.json)
    }
}

/// Whether a folder is meant to be a checkpoint, whole or not.
fn is_checkpoint(path: &Path) -> bool {
    let named = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("update_"));
    path.is_dir() && (named || ["manifest.json", "COMPLETE"].iter().any(|file| path.join(file).exists()))
}

fn not_a_checkpoint(e: Error) -> Error {
    match e {
        Error::File { path, message } if path.is_dir() => {
            Error::File { path, message: format!("is not a checkpoint, and as a model it {message}") }
        }
        other => other,
    }
}

fn show<T: serde::Serialize + Display>(description: &T, json: bool) -> Result<i32> {
    let text = match json {
        true => serde_json::to_string_pretty(description).map_err(|e| Error::Failed(format!("no JSON: {e}")))?,
        false => description.to_string(),
    };
    print(&text);
    Ok(EXIT_DONE)
}
