//! Prompt files, whatever their name: text, JSON or a table; and folders of them.

use super::json::{self, object_prompt};
use super::layout::Layout;
use super::lines::{Problem, lines};
use super::{Format, Prompt, Split, table};
use crate::error::{Error, Result};
use crate::fs;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

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
pub(super) fn read_prompts(path: &Path, format: Format) -> Result<Vec<Prompt>> {
    let error = |message: String| Error::File { path: path.to_path_buf(), message };
    let unreadable = |e| error(format!("cannot be read ({e}); give a prompt file, or the name of an embedded set"));
    let bytes = fs::regular_bytes(path).map_err(unreadable)?;
    let wrong = |problem: Problem| error(problem.to_string());
    let text = decoded(&bytes).map_err(error)?;
    let prompts = match format {
        Format::Text => Ok(text_prompts(&text)),
        Format::Jsonl => json::line_prompts(&text),
        Format::Auto => match Layout::of(&text, path).map_err(wrong)? {
            Layout::Text => Ok(text_prompts(&text)),
            Layout::JsonLines => json::line_prompts(&text),
            Layout::JsonList => json::list_prompts(&text),
            Layout::Table(delimiter) => table_prompts(&text, delimiter),
        },
    };
    let mut prompts = prompts.map_err(wrong)?;
    if prompts.is_empty() {
        return Err(error("no prompt in this file; write one prompt a line".to_string()));
    }
    prompts.iter_mut().enumerate().for_each(|(index, prompt)| prompt.index = index);
    Ok(prompts)
}

/// Files that are no text, by their first bytes.
const BINARY: [(&[u8], &str); 11] = [
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"%PDF-", "a PDF document"),
    (b"{\\rtf", "an RTF document"),
];

/// The bytes as text, each line's end a line feed, without a byte order mark.
fn decoded(bytes: &[u8]) -> std::result::Result<String, String> {
    if let Some((_, what)) = BINARY.iter().find(|(start, _)| bytes.starts_with(start)) {
        return Err(format!("is {what}; write its prompts into a UTF-8 text file, one a line"));
    }
    let line_of = |end: usize| 1 + bytes[..end].iter().filter(|&&byte| byte == b'\n').count();
    if let Some(zero) = bytes.iter().position(|&byte| byte == 0) {
        let line = line_of(zero);
        return Err(format!("line {line}: holds a zero byte: UTF-16, or no text at all; save the file as UTF-8"));
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|error| format!("line {}: not UTF-8; save the file as UTF-8", line_of(error.valid_up_to())))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    Ok(text.replace("\r\n", "\n").replace('\r', "\n"))
}

/// Each line is a prompt as it stands.
fn text_prompts(text: &str) -> Vec<Prompt> {
    lines(text).map(|(_, line)| Prompt::new(0, line)).collect()
}

/// Each row below the header is a prompt, and its other columns are what is said of it.
fn table_prompts(text: &str, delimiter: Option<char>) -> std::result::Result<Vec<Prompt>, Problem> {
    let mut rows = table::rows(text, delimiter)?.into_iter();
    let Some((line, header)) = rows.next() else { return Ok(Vec::new()) };
    let names = table::names(&header).map_err(|message| Problem::at_line(line, message))?;
    let prompt = |(line, row): (usize, Vec<String>)| {
        if row.len() != names.len() {
            let message = format!(
                "has {} columns, and the header {}; put what holds a delimiter into double quotes, or set data.format = \
                 \"text\" if each line is a prompt as it stands",
                row.len(),
                names.len()
            );
            return Err(Problem::at_line(line, message));
        }
        let fields = names.iter().cloned().zip(row.into_iter().map(Value::from));
        object_prompt(fields.collect::<Map<_, _>>()).map_err(|message| Problem::at_line(line, message))
    };
    rows.map(prompt).collect()
}
