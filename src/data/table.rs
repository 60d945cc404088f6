//! Tables as RFC 4180 has them, with commas, semicolons or tabs; strict, so that a quote left open never swallows prompts.

use super::json::{NEGATIVE, PROMPT};
use super::lines::{Problem, lines};
use std::collections::BTreeSet;

const DELIMITERS: [char; 3] = ['\t', ',', ';'];

/// Names of columns that tables of prompts have; beside one of them a first line without spaces is a header.
const USUAL: [&str; 8] = ["caption", "captions", "text", "description", "category", "label", "tag", "id"];

/// Whether this is what the column of the prompts is called: `prompt`, or `Prompts` (DrawBench).
fn is_prompt(name: &str) -> bool {
    let name = name.trim().to_lowercase();
    name == PROMPT || name == "prompts"
}

/// What stands between the columns of a header that names one of them `prompt`; nothing where there is no other column.
/// `None` where the line is no such header.
pub(super) fn delimiter_of_header(line: &str) -> Option<Option<char>> {
    if rows(line, None).is_ok_and(|rows| rows.iter().any(|(_, row)| is_prompt(&row[0]))) {
        return Some(None);
    }
    let has_prompt = |&delimiter: &char| {
        rows(line, Some(delimiter)).is_ok_and(|rows| rows.iter().any(|(_, row)| row.iter().any(|name| is_prompt(name))))
    };
    DELIMITERS.into_iter().find(has_prompt).map(Some)
}

/// The names of a header's columns, those of prompts and negative prompts as in JSON.
pub(super) fn names(header: &[String]) -> Result<Vec<String>, String> {
    let name = |(i, name): (usize, &String)| match name.trim() {
        "" => format!("column {}", i + 1), // pandas' index
        name if is_prompt(name) => PROMPT.to_owned(),
        name if name.to_lowercase().replace([' ', '-'], "_") == NEGATIVE => NEGATIVE.to_owned(),
        name => name.to_owned(),
    };
    let names: Vec<String> = header.iter().enumerate().map(name).collect();
    let mut seen = BTreeSet::new();
    match names.iter().find(|name| !seen.insert(*name)) {
        Some(twice) => Err(format!("names the column {twice:?} twice; give each a name of its own")),
        None => Ok(names),
    }
}

/// The number of columns of what surely is a table, although no column is called `prompt`.
pub(super) fn columns_without_header(text: &str) -> Option<usize> {
    let (_, first) = lines(text).next()?;
    DELIMITERS.into_iter().find_map(|delimiter| {
        let rows = rows(text, Some(delimiter)).ok()?;
        let columns = rows.first().map(|(_, row)| row.len()).filter(|&columns| columns > 1)?;
        let even = rows.len() > 1 && rows.iter().all(|(_, row)| row.len() == columns);
        let named = || {
            let words: Vec<&str> = first.split(delimiter).collect();
            let usual = |word: &&str| USUAL.iter().any(|name| word.eq_ignore_ascii_case(name));
            !first.contains(' ') && words.iter().any(usual)
        };
        // Prose has a space behind a comma, and no tabs.
        let quoted = || {
            let closed = format!("\"{delimiter}");
            let field =
                |line: &str| line.starts_with('"') && line.contains(&closed) && !line.contains(&(closed.clone() + " "));
            lines(text).any(|(_, line)| field(line))
        };
        (even && (delimiter == '\t' || named() || quoted())).then_some(columns)
    })
}

/// The rows that are not empty: the line that each begins on, counted from 1, and its fields.
///
/// # Errors
/// A quote that does not end, or does not end its field.
pub(super) fn rows(text: &str, delimiter: Option<char>) -> Result<Vec<(usize, Vec<String>)>, Problem> {
    let mut reader = Reader { rest: text, line: 1, delimiter };
    let mut rows = Vec::new();
    while !reader.rest.is_empty() {
        let line = reader.line;
        let row = reader.row()?;
        if row.iter().any(|field| !field.trim().is_empty()) {
            rows.push((line, row));
        }
    }
    Ok(rows)
}

struct Reader<'a> {
    rest: &'a str,
    /// The line that `rest` begins on.
    line: usize,
    /// What stands between fields; nothing: each line is one field.
    delimiter: Option<char>,
}

impl Reader<'_> {
    /// The next row, with the end of its line.
    fn row(&mut self) -> Result<Vec<String>, Problem> {
        let mut fields = Vec::new();
        loop {
            fields.push(if self.rest.starts_with('"') { self.quoted()? } else { self.plain() });
            match self.rest.chars().next() {
                Some('\n') => {
                    self.rest = &self.rest[1..];
                    self.line += 1;
                    return Ok(fields);
                }
                Some(delimiter) => self.rest = &self.rest[delimiter.len_utf8()..],
                None => return Ok(fields),
            }
        }
    }

    /// A field without quotes around it, up to its end.
    fn plain(&mut self) -> String {
        let end = self.rest.find(|c| c == '\n' || Some(c) == self.delimiter).unwrap_or(self.rest.len());
        let (field, rest) = self.rest.split_at(end);
        self.rest = rest;
        field.to_owned()
    }

    /// A field in quotes, in which a doubled quote is one, up to its end.
    fn quoted(&mut self) -> Result<String, Problem> {
        let begun = self.line;
        let mut field = String::new();
        self.rest = &self.rest[1..];
        loop {
            let Some(end) = self.rest.find('"') else {
                return Err(Problem::at_line(begun, "opens a double quote that is never closed; close it"));
            };
            field.push_str(&self.rest[..end]);
            self.line += self.rest[..end].matches('\n').count();
            self.rest = &self.rest[end + 1..];
            match self.rest.chars().next() {
                Some('"') => {
                    field.push('"');
                    self.rest = &self.rest[1..];
                }
                next if next.is_none_or(|c| c == '\n' || Some(c) == self.delimiter) => return Ok(field),
                _ => {
                    let message = "goes on behind a closing double quote; double the quotes within a field";
                    return Err(Problem::at_line(self.line, message));
                }
            }
        }
    }
}
