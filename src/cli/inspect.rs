//! `flowrl-dist inspect`.

use super::print;
use crate::checkpoint::{self, Resume};
use crate::error::{EXIT_DONE, EXIT_USAGE, Error, Result};
use crate::model::files;
use crate::plain;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// What is looked at.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  flowrl-dist inspect runs/glyphs/checkpoints/update_00000050\n  \
    flowrl-dist inspect models/stable-diffusion-3.5-medium\n  \
    flowrl-dist inspect sd3.5_large.safetensors --json")]
pub struct Arguments {
    /// A checkpoint's folder, or a run's, of which the newest is taken; or a model: a diffusers folder, a safetensors file, a
    /// LoRA of PEFT, diffusers, kohya or ComfyUI
    path: PathBuf,
    /// Of a model: check names, shapes and types only, without looking through the weights for NaN and infinite numbers
    #[arg(long)]
    headers: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Verifies a checkpoint or a model's files as loading them does, then prints. Exit code 2 for a model that could not be
/// loaded.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let path = arguments.path.as_path();
    let of_run = match is_run(path) {
        true => checkpoint::find(&Resume::From(path.to_path_buf()), Path::new(""))?,
        false => None,
    };
    let path = of_run.as_deref().unwrap_or(path);
    if is_checkpoint(path) {
        show(&checkpoint::describe(path)?, arguments.json)?;
        return Ok(EXIT_DONE);
    }
    let model = files::describe(path, !arguments.headers).map_err(not_a_checkpoint)?;
    show(&model, arguments.json)?;
    Ok(if model.parts.iter().all(|part| part.problem.is_none()) { EXIT_DONE } else { EXIT_USAGE })
}

/// Whether a run's folder is meant, its folder of checkpoints, or the file that names the best of them.
fn is_run(path: &Path) -> bool {
    path.join("checkpoints").is_dir()
        || path.is_dir() && path.ends_with("checkpoints")
        || path.ends_with("checkpoints/BEST")
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

fn show<T: serde::Serialize + Display>(description: &T, json: bool) -> Result<()> {
    let text = match json {
        true => serde_json::to_string_pretty(description).map_err(|e| Error::Failed(format!("no JSON: {e}")))?,
        false => plain::short_lines(&description.to_string()),
    };
    print(&text);
    Ok(())
}
