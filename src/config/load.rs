//! TOML and `--set` to a typed configuration; what is wrong in one line.

use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use std::path::Path;
use toml::{Table, Value};

/// Reads `file`, or `embedded` without one, and applies `key.path=value` settings over it.
pub(super) fn read<T: DeserializeOwned>(file: Option<&Path>, embedded: &str, set: &[String]) -> Result<T> {
    let (origin, text) = match file {
        None => ("the embedded configuration".to_owned(), embedded.to_owned()),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| {
                Error::Usage(format!("{}: cannot be read ({e}); give a TOML file to --config", path.display()))
            })?;
            (path.display().to_string(), text)
        }
    };
    let mut table: Table = text.parse().map_err(|e: toml::de::Error| {
        let line = e.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        Error::Usage(format!("{origin}: line {line} is not TOML: {}", one_line(e.message())))
    })?;
    for setting in set {
        apply(&mut table, setting)?;
    }
    typed(table, &origin)
}

/// One `key.path=value`: the value as TOML if it is that, else as text; a number in the path is a place in a list.
fn apply(table: &mut Table, setting: &str) -> Result<()> {
    let bad = |why: &str| Error::Usage(format!("--set {setting}: {why}; write section.key=value"));
    let (path, value) = setting.split_once('=').ok_or_else(|| bad("there is no ="))?;
    let value = format!("v = {value}").parse::<Table>().ok().and_then(|mut t| t.remove("v")).unwrap_or(value.into());
    let keys: Vec<&str> = path.trim().split('.').collect();
    if keys.iter().any(|k| k.is_empty()) {
        return Err(bad("a key is empty"));
    }
    let (last, sections) = keys.split_last().ok_or_else(|| bad("the key is empty"))?;
    let [first, rest @ ..] = sections else { return Err(bad("there is no section")) };
    let mut place = table.entry(*first).or_insert_with(|| Value::Table(Table::new()));
    for key in rest {
        place = match place {
            Value::Table(t) => t.entry(*key).or_insert_with(|| Value::Table(Table::new())),
            Value::Array(list) => {
                let index: usize = key.parse().map_err(|_| bad("a list takes a number, counted from 0"))?;
                let len = list.len();
                list.get_mut(index).ok_or_else(|| bad(&format!("the list has {len} entries, counted from 0")))?
            }
            _ => return Err(bad(&format!("{key} lies inside a value that is no section"))),
        };
    }
    match place {
        Value::Table(t) => t.insert((*last).to_owned(), value),
        _ => return Err(bad("the key lies inside a value that is no section")),
    };
    Ok(())
}

/// The table as a T, or where it is not one.
fn typed<T: DeserializeOwned>(table: Table, origin: &str) -> Result<T> {
    let root = Value::Table(table);
    serde_path_to_error::deserialize(root.clone()).map_err(|e| {
        let path = e.path().to_string();
        let message = one_line(e.inner().message());
        Error::Usage(match unknown_field(&message) {
            Some((field, known)) => unknown(origin, &path, field, &known),
            None => {
                let value = lookup(&root, &path).map_or(String::new(), |v| format!(" = {}", one_line(&v.to_string())));
                let hint = if message.contains("expected") { "" } else { "; see configs/reference.toml" };
                format!("{origin}: {path}{value}: {message}{hint}")
            }
        })
    })
}

/// Field and known fields of serde's message on an unknown one.
fn unknown_field(message: &str) -> Option<(&str, Vec<&str>)> {
    let mut quoted = message.strip_prefix("unknown field `")?.split('`').step_by(2);
    Some((quoted.next()?, quoted.filter(|s| !s.is_empty()).collect()))
}

fn unknown(origin: &str, path: &str, field: &str, known: &[&str]) -> String {
    let section = path.strip_suffix(field).unwrap_or(path).trim_end_matches('.');
    let full = |key: &str| if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
    let nearest = known.iter().min_by_key(|k| strsim::levenshtein(k, field));
    let meant = nearest
        .filter(|k| strsim::levenshtein(k, field) <= 3)
        .map_or(String::new(), |k| format!("did you mean {}? ", full(k)));
    format!("{origin}: {}: no such key; {meant}known here: {}", full(field), known.join(", "))
}

/// The value at a path such as `reward[0].weight`.
fn lookup<'a>(root: &'a Value, path: &str) -> Option<&'a Value> {
    path.split(['.', '[']).filter(|k| !k.is_empty()).try_fold(root, |value, key| match value {
        Value::Array(list) => list.get(key.trim_end_matches(']').parse::<usize>().ok()?),
        Value::Table(t) => t.get(key),
        _ => None,
    })
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
