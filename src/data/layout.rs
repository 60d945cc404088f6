//! How the prompts of a file are written, by what it holds: its name only has to agree.

use super::lines::{Problem, lines};
use super::{markup, table};
use std::path::Path;

/// How a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// One prompt a line.
    Text,
    /// One JSON value a line.
    JsonLines,
    /// One JSON list.
    JsonList,
    /// Rows with this between their fields, the first of which names the columns; nothing: one column.
    Table(Option<char>),
}

/// The remedy where a line may be meant as it stands.
const AS_IT_STANDS: &str = "set data.format = \"text\" if each line is a prompt as it stands";

impl Layout {
    /// The layout of a file's text.
    ///
    /// # Errors
    /// It is not clear, or not what the file's name says: the line, and the remedy.
    pub fn of(text: &str, path: &Path) -> Result<Layout, Problem> {
        let name = path.extension().map(|end| end.to_string_lossy().to_lowercase()).unwrap_or_default();
        let Some((line, first)) = lines(text).next() else { return Ok(Layout::Text) };
        if is_json_list(text.trim(), first) {
            return Ok(Layout::JsonList);
        }
        if first == "{" {
            let message =
                "begins an object of several lines; write each in one line (jq -c does), or all in one list [ ]";
            return Err(Problem::at_line(line, message));
        }
        // A text in quotes may be a prompt with its quotes, unless the name says that it is JSON.
        if is_json_object(first) || ["json", "jsonl", "ndjson"].contains(&name.as_str()) {
            return Ok(Layout::JsonLines);
        }
        if let Some(delimiter) = table::delimiter_of_header(first) {
            return Ok(Layout::Table(delimiter));
        }
        if ["csv", "tsv"].contains(&name.as_str()) {
            let message = format!(
                "names no column \"prompt\"; write a header that calls the prompts' column so, or {AS_IT_STANDS}"
            );
            return Err(Problem::at_line(line, message));
        }
        if markup::is_extension(&name) {
            let message = format!(
                "the file's name ends in .{name}, and its prompts are not read as that; write each on a line of its own, or \
                 {AS_IT_STANDS}"
            );
            return Err(Problem::at_line(line, message));
        }
        check_text(text)?;
        Ok(Layout::Text)
    }
}

/// Whether a text that begins with `[` is meant to be a JSON list: `[photo] a cat` is not.
fn is_json_list(text: &str, first: &str) -> bool {
    let Some(inside) = text.strip_prefix('[') else { return false };
    let entry = inside.trim_start().starts_with(['"', '\'', '{', ']']);
    entry && (text.ends_with(']') || first.ends_with(['[', ',', '{']))
}

/// Whether a line is meant to be a JSON object, or Python's word for one: `{neon|wood} sign` is not.
fn is_json_object(line: &str) -> bool {
    line.strip_prefix('{').is_some_and(|inside| inside.trim_start().starts_with(['"', '\'']))
}

/// Refuses what is surely no list of prompts, one a line.
fn check_text(text: &str) -> Result<(), Problem> {
    let problem = |line: usize, message: String| Err(Problem::at_line(line, format!("{message}, or {AS_IT_STANDS}")));
    for (line, words) in lines(text) {
        if words.starts_with("version https://git-lfs") {
            return problem(line, "is a pointer of Git LFS, not the file itself; fetch it (git lfs pull)".to_owned());
        }
        if let Some(what) = markup::of_line(words) {
            return problem(line, what.to_owned());
        }
        if is_json_object(words) {
            return problem(line, "is a JSON object among lines of text; write all in one way".to_owned());
        }
        if words == "#" || words.starts_with("# ") || words.starts_with("// ") {
            return problem(line, "looks like a comment, which prompt files have none of; delete it".to_owned());
        }
    }
    let (first, _) = lines(text).next().unwrap_or((1, ""));
    if let Some(what) = markup::of_all(text) {
        return problem(first, what.to_owned());
    }
    if lines(text).count() > 1 && lines(text).all(|(_, line)| serde_json::from_str::<String>(line).is_ok()) {
        return problem(first, "is in double quotes, as all lines are; take them away".to_owned());
    }
    if let Some(columns) = table::columns_without_header(text) {
        return problem(
            first,
            format!(
                "looks like the first of a table of {columns} columns; write a header above it that names one \"prompt\""
            ),
        );
    }
    Ok(())
}
