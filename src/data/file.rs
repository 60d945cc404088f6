//! Prompt files: plain text or JSON lines.

use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::Path;

/// A line of a `.jsonl` prompt file. Fields of other programs (`tag`, `metadata`, ...) are not ours to refuse.
#[derive(Deserialize)]
struct JsonLine {
    prompt: String,
}

/// The prompts of a file in its order; see [`PromptSet::from_file`](super::PromptSet::from_file).
pub(super) fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
        at_line(path, line, "not UTF-8; save the file as UTF-8".to_string())
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let is_json = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl"));

    let mut prompts = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let prompt = if is_json {
            json_prompt(line).map_err(|message| at_line(path, i + 1, message))?
        } else {
            line.to_string()
        };
        prompts.push(prompt);
    }
    if prompts.is_empty() {
        let message = "no prompt in this file; write one prompt a line".to_string();
        return Err(Error::File { path: path.to_path_buf(), message });
    }
    Ok(prompts)
}

/// The trimmed `prompt` of a JSON line, or what is wrong with it.
fn json_prompt(line: &str) -> std::result::Result<String, String> {
    let remedy = r#"write {"prompt": "..."}"#;
    let JsonLine { prompt } = serde_json::from_str(line).map_err(|error| format!("{error}; {remedy}"))?;
    match prompt.trim() {
        "" => Err(format!("the prompt is empty; {remedy}")),
        prompt => Ok(prompt.to_string()),
    }
}

fn at_line(path: &Path, line: usize, message: String) -> Error {
    Error::File { path: path.to_path_buf(), message: format!("line {line}: {message}") }
}
