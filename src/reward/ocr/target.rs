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

/// The text between the prompt's first double quotes that hold one, plain or typographic; `None` if there is none.
///
/// A double quote behind a digit is an inch mark where no text is open. `\"` opens what `\"` closes, and is a quote of the
/// text within others.
pub fn target(prompt: &str) -> Option<String> {
    let prompt = uncurl(prompt);
    let mut rest = prompt.as_str();
    while let Some(open) = rest.find('"') {
        let before = &rest[..open];
        rest = &rest[open + 1..];
        if before.ends_with(|c: char| c.is_ascii_digit()) {
            continue;
        }
        let escaped = before.ends_with('\\');
        let close = rest.match_indices('"').map(|(at, _)| at).find(|&at| rest[..at].ends_with('\\') == escaped)?;
        let quoted = if escaped { &rest[..close - 1] } else { &rest[..close] };
        if !quoted.trim().is_empty() {
            return Some(quoted.replace("\\\"", "\""));
        }
        rest = &rest[close + 1..];
    }
    None
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
        ] {
            assert_eq!(target(prompt).as_deref(), Some(expected), "{prompt}");
        }
        for prompt in ["a cat", "a 12\" record", "an open \"quote", "a \"\" sign", "\u{ab}OPEN\u{bb}", "it's a dog's"] {
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
