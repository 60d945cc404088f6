//! Prompt files: plain text or JSON lines, and folders of them.

use super::{Format, Metadata, Split};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Ends of the names of files whose lines are surely no prompts.
const TABLES: [&str; 5] = ["json", "csv", "tsv", "parquet", "arrow"];

/// A prompt as a file holds it.
pub(super) struct Line {
    pub text: String,
    pub metadata: Option<Metadata>,
}

/// The file of a source: itself, or what a data set's folder holds for the split.
///
/// Folders are those of DiffusionNFT and Flow-GRPO: `train_metadata.jsonl` or `train.txt`, and `test` likewise.
pub(super) fn file_of(source: &Path, split: Split, format: Format) -> Result<PathBuf> {
    if !source.is_dir() {
        return Ok(source.to_path_buf());
    }
    let stem = match split {
        Split::Train => "train",
        Split::Eval => "test",
    };
    let names = [format!("{stem}_metadata.jsonl"), format!("{stem}.jsonl"), format!("{stem}.txt")];
    let wanted: &[String] = match format {
        Format::Auto => &names,
        Format::Jsonl => &names[..2],
        Format::Text => &names[2..],
    };
    let found = wanted.iter().map(|name| source.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| {
        let message = format!("this folder holds none of {}; name the prompt file itself", wanted.join(", "));
        Error::File { path: source.to_path_buf(), message }
    })
}

/// The prompts of a file in its order; see [`PromptSet::from_file`](super::PromptSet::from_file).
pub(super) fn read_prompts(path: &Path, format: Format) -> Result<Vec<Line>> {
    let unreadable = |e| format!("cannot be read ({e}); give a prompt file, or the name of an embedded set");
    let is_json = match format {
        Format::Text => false,
        Format::Jsonl => true,
        Format::Auto => match path.extension().map(|end| end.to_string_lossy().to_lowercase()).as_deref() {
            Some("jsonl") => true,
            Some(end) if TABLES.contains(&end) => {
                let message = format!(
                    "a .{end} file is not one prompt a line; write one prompt a line (.txt) or {{\"prompt\": \"...\"}} a line \
                     (.jsonl), or set data.format if it is one of these already"
                );
                return Err(Error::File { path: path.to_path_buf(), message });
            }
            _ => false,
        },
    };
    let bytes = std::fs::read(path).map_err(|e| Error::File { path: path.to_path_buf(), message: unreadable(e) })?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
        at_line(path, line, "not UTF-8; save the file as UTF-8".to_string())
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut prompts = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let prompt = if is_json {
            json_prompt(line).map_err(|message| at_line(path, i + 1, message))?
        } else {
            Line { text: line.to_string(), metadata: None }
        };
        prompts.push(prompt);
    }
    if prompts.is_empty() {
        let message = "no prompt in this file; write one prompt a line".to_string();
        return Err(Error::File { path: path.to_path_buf(), message });
    }
    Ok(prompts)
}

/// The trimmed `prompt` of a JSON line with the whole object, or what is wrong with it.
fn json_prompt(line: &str) -> std::result::Result<Line, String> {
    let remedy = r#"write {"prompt": "..."}"#;
    let object: Map<String, Value> = serde_json::from_str(line).map_err(|error| format!("{error}; {remedy}"))?;
    let text = match object.get("prompt") {
        None => return Err(format!("there is no field \"prompt\"; {remedy}")),
        Some(Value::String(text)) => text.trim(),
        Some(other) => return Err(format!("the prompt is {other}, not text; {remedy}")),
    };
    if text.is_empty() {
        return Err(format!("the prompt is empty; {remedy}"));
    }
    let text = text.to_string();
    // Without a field beside the prompt there is nothing more to say of it.
    let metadata = (object.len() > 1).then(|| Arc::new(object));
    Ok(Line { text, metadata })
}

fn at_line(path: &Path, line: usize, message: String) -> Error {
    Error::File { path: path.to_path_buf(), message: format!("line {line}: {message}") }
}
