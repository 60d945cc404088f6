//! TOML and `--set` to a typed configuration; what is wrong in one line.

use super::{paths, renamed};
use crate::checks::without_secrets;
use crate::error::Error;
use crate::fs;
use crate::variants::name_first;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Reads `file`, or `embedded` without one, with what it extends, applies `key.path=value` settings over it, and checks
/// the result. Its paths are relative to the working folder then ([`paths`]).
pub(super) fn read<T: DeserializeOwned>(
    file: Option<&Path>,
    embedded: &str,
    set: &[String],
    check: impl Fn(&T) -> Result<(), String>,
) -> Result<T, Error> {
    let (origin, table) = match file {
        None => ("the embedded configuration".to_owned(), parse(embedded, "the embedded configuration")?),
        Some(path) => (path.display().to_string(), read_extended(path, &mut Vec::new())?),
    };
    let set: Vec<String> = set.iter().map(|setting| renamed::setting(setting)).collect();
    let mut root = Value::Table(table);
    for setting in &set {
        apply(&mut root, setting)?;
    }
    let problem = |p: String| Error::Usage(format!("{}: {p}", if is_set(&p, &set) { "--set" } else { &origin }));
    root.as_table_mut().map_or(Ok(()), renamed::keys_of).map_err(problem)?; // of a section that was set as a whole
    let config = typed(root).map_err(problem)?;
    check(&config).map_err(problem)?;
    Ok(config)
}

/// The values of a configuration that a program wrote, whatever they are; nothing where they are of another form.
pub(super) fn unchecked<T: DeserializeOwned>(text: &str) -> Option<T> {
    let mut table: Table = text.parse().ok()?;
    renamed::keys_of(&mut table).ok()?;
    typed(Value::Table(table)).ok()
}

/// The key with which a file names another, whose values it starts from.
const EXTENDS: &str = "extends";

/// The table of a file over that of the file it extends, whose path is relative to its own folder.
fn read_extended(path: &Path, readers: &mut Vec<PathBuf>) -> Result<Table, Error> {
    let origin = path.display().to_string();
    let text = fs::regular_text(path).map_err(|e| match readers.last() {
        None => Error::Usage(format!("{origin}: cannot be read ({e}); give a TOML file to --config")),
        Some(reader) => Error::Usage(format!(
            "{}: {EXTENDS} = {origin:?}: cannot be read ({e}); name a file, relative to this one's folder",
            reader.display()
        )),
    })?;
    let mut table = parse(&text, &origin)?;
    renamed::keys_of(&mut table).map_err(|problem| Error::Usage(format!("{origin}: {problem}")))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    paths::of_file_in(folder, &mut table);
    let Some(base) = table.remove(EXTENDS) else { return Ok(table) };
    let bad = |why: &str| Err(Error::Usage(format!("{origin}: {EXTENDS} = {base}: {why}")));
    let Some(name) = base.as_str() else { return bad("must be a path in quotes") };
    readers.push(path.to_path_buf());
    let base_path = paths::join(folder, Path::new(name));
    if readers.len() > 8 {
        return bad("more than 8 files, each extending the next; is there a circle?");
    }
    let mut all = read_extended(&base_path, readers)?;
    overlay(&mut all, table);
    Ok(all)
}

/// Puts the values of `above` over `below`: sections are merged, everything else, lists too, is replaced.
fn overlay(below: &mut Table, above: Table) {
    for (key, value) in above {
        match (below.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => overlay(below, above),
            (_, value) => {
                below.insert(key, value);
            }
        }
    }
}

fn parse(text: &str, origin: &str) -> Result<Table, Error> {
    text.parse().map_err(|e: toml::de::Error| {
        let line = e.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count());
        let (found, why) = (text.lines().nth(line).unwrap_or_default().trim(), one_line(e.message()));
        let problem = out_of_range(&why, found).unwrap_or(format!("is not TOML ({why}); write key = value"));
        Error::Usage(format!("{origin}: line {}: {found}: {problem}", line + 1))
    })
}

/// What a number of a line must be, where the parser's message is that TOML has no place for it.
fn out_of_range(message: &str, line: &str) -> Option<String> {
    let is_whole = ["u64 value was too large", "integer number overflowed", "` as i128", "` as u128"];
    if message.contains("floating-point number overflowed") {
        return Some(format!("must be at most {:e}", f64::MAX));
    }
    let is_negative = line.split_once('=').is_some_and(|(_, value)| value.contains('-'));
    is_whole.iter().any(|words| message.contains(words)).then(|| match is_negative {
        true => format!("must be at least {}", i64::MIN),
        false => format!("must be at most {}", i64::MAX),
    })
}

/// Whether a setting gave the key that a problem begins with, or a part of it.
fn is_set(problem: &str, set: &[String]) -> bool {
    let parts = |path: &str| -> Vec<String> {
        path.split(['.', '[', ']']).map(|k| k.trim().to_owned()).filter(|k| !k.is_empty()).collect()
    };
    let key = parts(problem.split([' ', ':']).next().unwrap_or_default());
    set.iter().filter_map(|setting| setting.split_once('=')).any(|(path, _)| {
        let path = parts(path);
        key.starts_with(&path) || path.starts_with(&key)
    })
}

/// The most parts of a key: more than any has, and few enough for what goes through them by recursion.
const DEEPEST: usize = 8;

/// One `key.path=value`: the value as TOML if it is that, else as text; a number in the path is a place in a list.
fn apply(root: &mut Value, setting: &str) -> Result<(), Error> {
    let bad = |why: &str| Error::Usage(format!("--set {}: {why}; write section.key=value", shown(setting)));
    if setting.contains(|c: char| c.is_control() && c != '\t') {
        return Err(bad("is more than one line; give each key a --set of its own"));
    }
    let (path, value) = setting.split_once('=').ok_or_else(|| bad("there is no ="))?;
    let value = format!("v = {value}").parse::<Table>().ok().and_then(|mut t| t.remove("v")).unwrap_or(value.into());
    let keys: Vec<&str> = path.split('.').map(str::trim).collect();
    if keys.len() > DEEPEST {
        return Err(bad(&format!("a key of {} parts, and no key has more than {DEEPEST}", keys.len())));
    }
    let (last, sections) = keys.split_last().filter(|_| !keys.contains(&"")).ok_or_else(|| bad("a key is empty"))?;
    let mut place = root;
    for key in sections {
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

/// The table as a T, or what is wrong where.
fn typed<T: DeserializeOwned>(mut root: Value) -> Result<T, String> {
    for (key, value) in root.as_table().into_iter().flatten() {
        // Serde would take a list as the values of the section's keys in their order.
        let write = match (["reward", "stage"].contains(&key.as_str()), value.is_array()) {
            (false, true) => format!("is no list; write one value, or one section [{key}]"),
            (true, false) => format!("is a list; write a section [[{key}]] for each"),
            _ => continue,
        };
        return Err(format!("{key} = {}: {write}", one_line(&value.to_string())));
    }
    names_first(&mut root);
    serde_path_to_error::deserialize(root.clone()).map_err(|e| {
        let path = e.path().to_string();
        let message = one_line(e.inner().message());
        if let Some((field, known)) = unknown_field(&message) {
            return unknown(&path, field, &known);
        }
        if let Some(field) = message.strip_prefix("missing field `").and_then(|m| m.strip_suffix('`')) {
            return format!("{path}.{field} is missing: add it; configs/reference.toml explains it");
        }
        match (lookup(&root, &path), &*remedy(&message)) {
            // Digits that are not a number of TOML came as text.
            (Some(Value::String(text)), WHOLE) if is_digits(text) => match text.parse::<i64>() {
                Ok(_) => format!("{path} = {text}: must be a whole number without zeros before it"),
                Err(_) => format!("{path} = {text}: must be at most {}", i64::MAX),
            },
            (Some(value), problem) => format!("{path} = {}: {problem}", shown_value(&path, value)),
            (None, problem) => format!("{path}: {problem}"),
        }
    })
}

/// Puts the names of sections before their other keys, which may depend on them.
fn names_first(root: &mut Value) {
    for (_, value) in root.as_table_mut().into_iter().flatten() {
        match value {
            Value::Table(section) => name_first(section),
            Value::Array(sections) => sections.iter_mut().filter_map(Value::as_table_mut).for_each(name_first),
            _ => {}
        }
    }
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// What a count or a seed must be.
const WHOLE: &str = "must be a whole number, 0 or above";

/// Serde's message as what the value must be; other messages say it already.
fn remedy(message: &str) -> String {
    let serdes = ["invalid ", "unknown "].iter().any(|start| message.starts_with(start));
    let wanted = match message.split_once(", expected ").filter(|_| serdes).map_or(message, |(_, expected)| expected) {
        "u8" | "u64" | "usize" => return WHOLE.to_owned(),
        "f64" => "a number",
        "a string" => "text in quotes",
        "path string" => "a path in quotes",
        "a boolean" => "true or false",
        "a tuple of size 2" | "fewer elements in array" => "a list of two numbers, such as [0.9, 0.999]",
        "string only" => "a name in quotes",
        "a sequence" => "a list in [ ]",
        "a map" => "names with their values in { }",
        says if says.starts_with("must") || says.starts_with("belongs to") || says.contains("expected") => {
            return says.to_owned();
        }
        e if e.starts_with("struct") => "a section with keys of its own",
        e => &e.replace('`', "\""),
    };
    format!("must be {wanted}")
}

/// Field and known fields of serde's message on an unknown one.
fn unknown_field(message: &str) -> Option<(&str, Vec<&str>)> {
    let mut quoted = message.strip_prefix("unknown field `")?.split('`').step_by(2);
    Some((quoted.next()?, quoted.filter(|s| !s.is_empty()).collect()))
}

fn unknown(path: &str, field: &str, known: &[&str]) -> String {
    let section = path.strip_suffix(field).unwrap_or(path).trim_end_matches('.');
    let full = |key: &str| if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
    let far = |key: &&&str| if field.starts_with(**key) { 0 } else { strsim::damerau_levenshtein(key, field) };
    let meant = known
        .iter()
        .min_by_key(far)
        .filter(|key| far(key) <= 1 + field.len() / 4)
        .map_or(String::new(), |key| format!("did you mean {}? ", full(key)));
    format!("{}: no such key; {meant}known here: {}", full(field), known.join(", "))
}

/// A value as it stands in the file, but for what may be a secret in an address.
fn shown_value(path: &str, value: &Value) -> String {
    match value {
        Value::String(address) if path.ends_with(".url") => format!("{:?}", without_secrets(address)),
        value => one_line(&value.to_string()),
    }
}

/// The value at a path such as `reward[0].weight`.
fn lookup<'a>(root: &'a Value, path: &str) -> Option<&'a Value> {
    path.split(['.', '[']).filter(|k| !k.is_empty()).try_fold(root, |value, key| match value {
        Value::Array(list) => list.get(key.trim_end_matches(']').parse::<usize>().ok()?),
        Value::Table(t) => t.get(key),
        _ => None,
    })
}

/// The beginning of a setting, without what moves a terminal's cursor.
fn shown(setting: &str) -> String {
    const MOST: usize = 80;
    let visible = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    let start: String = setting.chars().take(MOST).map(visible).collect();
    if setting.chars().nth(MOST).is_some() { start + "..." } else { start }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
