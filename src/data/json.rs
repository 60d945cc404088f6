//! Prompts as JSON: an object a line, or one list of texts or objects.

use super::Prompt;
use super::lines::{Problem, lines};
use super::unique::Unique;
use serde_json::{Map, Value};
use std::sync::Arc;

const REMEDY: &str = r#"write {"prompt": "..."}"#;

/// The key of a prompt's text in JSON, and its column in a table.
pub(super) const PROMPT: &str = "prompt";
/// The key of what guidance leads away from (Flow-Factory's).
pub(super) const NEGATIVE: &str = "negative_prompt";

/// The prompts of JSON lines, each an object, or each a text in quotes.
pub(super) fn line_prompts(text: &str) -> Result<Vec<Prompt>, Problem> {
    let mut kinds = Kinds::default();
    let prompt = |(line, text): (usize, &str)| {
        let value = serde_json::from_str(text).map_err(|e| match e.is_data() {
            true => without_place(&e),
            false => format!("{}; {REMEDY}", without_place(&e)),
        });
        value.and_then(|Unique(value)| kinds.prompt(value)).map_err(|message| Problem::at_line(line, message))
    };
    lines(text).map(prompt).collect()
}

/// The prompts of one JSON list.
pub(super) fn list_prompts(text: &str) -> Result<Vec<Prompt>, Problem> {
    let values: Vec<Unique> = serde_json::from_str(text.trim_end()).map_err(|e| {
        if e.is_data() {
            return Problem::at_line(e.line(), without_place(&e));
        }
        let message = format!(
            "{}: this is not one JSON list; write [\"...\", \"...\"], or one prompt a line, or set data.format = \"text\" \
             if each line is a prompt as it stands",
            without_place(&e)
        );
        Problem::at_line(e.line(), message)
    })?;
    let mut kinds = Kinds::default();
    let prompt = |(i, Unique(value))| kinds.prompt(value).map_err(|message| Problem::at_entry(i + 1, message));
    values.into_iter().enumerate().map(prompt).collect()
}

/// Whether a file's prompts are texts; nothing before the first.
#[derive(Default)]
struct Kinds(Option<bool>);

impl Kinds {
    /// The prompt of a text or an object, which must be what those before it were.
    fn prompt(&mut self, value: Value) -> Result<Prompt, String> {
        let is_text = value.is_string();
        if *self.0.get_or_insert(is_text) != is_text {
            return Err(format!("{} among others of another kind; {REMEDY}", shown(&value)));
        }
        match value {
            Value::Object(object) => object_prompt(object),
            Value::String(text) => object_prompt(Map::from_iter([(PROMPT.to_owned(), text.into())])),
            other => Err(format!("{} is not an object; {REMEDY}", shown(&other))),
        }
    }
}

/// The prompt that an object says: its trimmed `prompt`, what guidance leads away from, and the whole object.
pub(super) fn object_prompt(object: Map<String, Value>) -> Result<Prompt, String> {
    let text = |key: &str| match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.trim().to_owned())),
        Some(other) => Err(format!("the {key} is {}, not text; {REMEDY}", shown(other))),
    };
    let prompt = match text(PROMPT)? {
        None => return Err(format!("there is no field \"{PROMPT}\"; {REMEDY}")),
        Some(prompt) if prompt.is_empty() => return Err(format!("the prompt is empty; {REMEDY}")),
        Some(prompt) => prompt,
    };
    let negative = text(NEGATIVE)?.filter(|negative| !negative.is_empty());
    // Without a field beside the prompt there is nothing more to say of it.
    let metadata = (object.len() > 1).then(|| Arc::new(object));
    Ok(Prompt { negative: negative.map(Into::into), metadata, ..Prompt::new(0, prompt) })
}

/// The parser's words without its place, which is one within the line.
fn without_place(error: &serde_json::Error) -> String {
    let words = error.to_string();
    words.split_once(" at line ").map_or(words.as_str(), |(words, _)| words).to_owned()
}

/// The beginning of a value.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
