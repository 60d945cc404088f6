//! The text that a picture of a prompt should show, and how what was read is compared with it.

use super::KEYS;
use crate::model::text::uncurl;
use std::collections::BTreeSet;

/// `1 - min(d, n) / n` for the edit distance d between what was read and the [target](target), n characters long; upper and
/// lower case are the same, as are plain and typographic quotes, and spaces do not count. `None` without such a text.
pub fn edit_reward(prompt: &str, read: &str) -> Option<f64> {
    let want = normal(&target(prompt)?);
    let length = want.chars().count();
    let distance = strsim::levenshtein(&want, &normal(read)).min(length);
    Some(1.0 - distance as f64 / length as f64)
}

/// As [`edit_reward`], where other text in the picture does no harm: 1 if the wanted text is part of what was read
/// (flow_grpo/ocr.py).
pub fn found_reward(prompt: &str, read: &str) -> Option<f64> {
    let want = normal(&target(prompt)?);
    if normal(read).contains(&want) { Some(1.0) } else { edit_reward(prompt, read) }
}

/// The text between the prompt's first double quotes that hold one, plain or typographic; `None` if there is none, or if one
/// of the quotes is without its other half: then it is not clear which belong together.
///
/// A double quote that is an inch mark is none: behind a number where no text is open, or behind a number and a space with a
/// space behind it. Typographic quotes go together and hold plain ones; `\"` opens what `\"` closes, and is a quote of the
/// text within others.
pub fn target(prompt: &str) -> Option<String> {
    let mut found = None;
    let mut at = 0;
    while let Some(open) = prompt[at..].find(is_quote).map(|offset| at + offset) {
        let (before, rest) = (&prompt[..open], &prompt[open..]);
        let mark = rest.chars().next()?;
        let inside = open + mark.len_utf8();
        if is_inch(before, mark, &prompt[inside..]) {
            at = inside;
            continue;
        }
        let quoted = quoted(mark, before.ends_with('\\'), &prompt[inside..])?;
        at = inside + quoted.len();
        at += prompt[at..].chars().next().map_or(0, char::len_utf8);
        let text = quoted.strip_suffix('\\').filter(|_| before.ends_with('\\')).unwrap_or(quoted);
        if found.is_none() && !text.trim().is_empty() {
            found = Some(uncurl(text).replace("\\\"", "\""));
        }
    }
    found
}

const OPENING: [char; 3] = ['\u{201c}', '\u{201e}', '\u{201f}'];
const CLOSING: char = '\u{201d}';

fn is_quote(c: char) -> bool {
    c == '"' || c == CLOSING || OPENING.contains(&c)
}

/// Whether a quote between these texts is an inch mark: `12"`, `12½"`, `12\"`, `27 "`.
fn is_inch(before: &str, mark: char, after: &str) -> bool {
    let is_number = |text: &str| text.ends_with(char::is_numeric);
    let before = before.strip_suffix('\\').unwrap_or(before);
    let ends = after.chars().next().is_none_or(|c| !c.is_alphanumeric() && !is_quote(c));
    match OPENING.contains(&mark) {
        true => is_number(before) && ends,
        false => is_number(before) || (is_number(before.trim_end()) && ends),
    }
}

/// The text up to the quote that closes what `mark` has opened; `None` without such a quote.
fn quoted(mark: char, is_escaped: bool, rest: &str) -> Option<&str> {
    let all = || rest.match_indices(is_quote).filter(|(at, _)| rest[..*at].ends_with('\\') == is_escaped);
    let any = || all().map(|(at, _)| at).next();
    let first = |closing: &str| all().find(|(_, quote)| *quote == closing).map(|(at, _)| at);
    let end = match mark {
        '"' => first("\"").or_else(any),
        // In the texts of some languages “ closes, in others ” opens.
        '\u{201e}' | CLOSING => all().find(|(_, quote)| *quote != "\"").map(|(at, _)| at).or_else(any),
        _ => {
            let mut depth = 1;
            let balanced = all().find(|(_, quote)| {
                depth += i32::from(quote.starts_with(OPENING)) - i32::from(quote.starts_with(CLOSING));
                depth == 0
            });
            balanced.map(|(at, _)| at).or_else(any)
        }
    };
    Some(&rest[..end?])
}

/// The characters of a target that the recogniser has no class for: a picture that shows them cannot score 1.
pub(super) fn unwritable(target: &str) -> BTreeSet<char> {
    target.chars().filter(|c| !c.is_whitespace() && !KEYS.contains(*c)).collect()
}

/// Without spaces, in lower case, with plain quotes.
fn normal(text: &str) -> String {
    uncurl(text).split_whitespace().collect::<String>().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_is_what_stands_between_quotes() {
        for (prompt, expected) in [
            ("a sign that says \"OPEN\" and \"CLOSED\"", "OPEN"),
            ("a sign that says \u{201c}OPEN\u{201d}", "OPEN"),
            ("ein Schild mit \u{201e}OFFEN\u{201c}", "OFFEN"),
            ("a sign \u{201c}DON\u{2019}T\u{201d}", "DON'T"),
            ("a 12\" record with the word \"OPEN\"", "OPEN"),
            ("a 12\u{201d} record with the word \u{201c}OPEN 24\u{201d}", "OPEN 24"),
            ("\"417\" in red on yellow", "417"),
            ("a 6'2\" man beside \"ROOM 12\"", "ROOM 12"),
            ("a sign that says \\\"OPEN\\\"", "OPEN"),
            ("\"He said \\\"HI\\\" twice\"", "He said \"HI\" twice"),
            ("a path \"C:\\DIR\"", "C:\\DIR"),
            ("an empty \"\" and \" \" before \"OPEN\"", "OPEN"),
            ("a 12\u{bd}\" record with the word \"417\"", "417"),
            ("a 3 \u{be}\" disk with the word \"417\"", "417"),
            ("a 12\\\" record with the word \\\"417\\\"", "417"),
            ("a 27 \" monitor with the word \"417\"", "417"),
            ("a 27 \u{201d} monitor with the word \u{201c}417\u{201d}", "417"),
            ("number 27 \"OPEN\" sign", "OPEN"),
            ("number 27 \u{201c}OPEN\u{201d} sign", "OPEN"),
            ("a sign saying \u{201c}the \"417\" road\u{201d}", "the \"417\" road"),
            ("a sign saying \u{201c}the \u{201c}417\u{201d} road\u{201d}", "the \"417\" road"),
            ("a sign saying \"the \u{201c}417\u{201d} road\"", "the \"417\" road"),
            ("a sign \u{201c}OPEN\" and \u{201c}CLOSED\"", "OPEN"),
            ("en skylt \u{201d}OPEN\u{201d} h\u{e4}r", "OPEN"),
            ("a sign \u{201c}OPEN\u{201c}", "OPEN"),
            ("a sign \"OPEN\u{201d}", "OPEN"),
        ] {
            assert_eq!(target(prompt).as_deref(), Some(expected), "{prompt}");
        }
        for prompt in [
            "a cat",
            "a 12\" record",
            "an open \"quote",
            "a \"\" sign",
            "\u{ab}OPEN\u{bb}",
            "it's a dog's",
            "a \"big\" record\" with the word \"OPEN\"",
            "a sign \"OPEN\" and a \" mark",
            "a sign \u{201c}OPEN, \"NOW\"",
        ] {
            assert_eq!(target(prompt), None, "{prompt}");
        }
    }

    #[test]
    fn quotes_of_every_make_are_the_same() {
        for prompt in ["a sign \"DON'T\"", "a sign \u{201c}DON\u{2019}T\u{201d}"] {
            for read in ["DON'T", "don\u{2019}t", "D O N 'T"] {
                assert_eq!((edit_reward(prompt, read), found_reward(prompt, read)), (Some(1.0), Some(1.0)), "{read}");
            }
            assert_eq!(edit_reward(prompt, "DONT"), Some(1.0 - 1.0 / 5.0));
        }
    }

    #[test]
    fn characters_without_a_class_are_named() {
        assert_eq!(unwritable("CAF\u{c9} \u{2013} 7 \u{20ac} & ~\\"), ['\u{c9}', '\u{2013}', '\u{20ac}'].into());
        assert!(unwritable("Don't \"stop\", ok?").is_empty());
    }
}
