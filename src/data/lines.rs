//! The lines of a prompt file, and what is wrong with one.

use std::fmt;

/// What is wrong with a file, and where.
#[derive(Debug)]
pub(super) struct Problem {
    /// `line 3`, counted from 1, or `entry 3`.
    place: String,
    message: String,
}

impl Problem {
    pub fn at_line(line: usize, message: impl Into<String>) -> Problem {
        Problem { place: format!("line {line}"), message: message.into() }
    }

    pub fn at_entry(entry: usize, message: impl Into<String>) -> Problem {
        Problem { place: format!("entry {entry}"), message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

/// The numbers of the lines that are not empty, and the lines, trimmed.
pub(super) fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_space = |c: char| c.is_whitespace() || c == '\u{feff}';
    let numbered = text.lines().enumerate().map(move |(i, line)| (i + 1, line.trim_matches(is_space)));
    numbered.filter(|(_, line)| !line.is_empty())
}
