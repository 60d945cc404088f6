//! Plain text for terminals and logs. Names of files, tensors and keys, prompts, and what peers and servers answer come
//! from elsewhere: their control characters would move the cursor, hide what was said, or forge a line of a log.

use std::borrow::Cow;

/// Characters of a line: a message, and its end, where the remedy stands.
const LONGEST: usize = 900;
const END: usize = 300;

/// One line: every control character as its escape (`\u{1b}`), and of a line that is too long the beginning and the end.
pub(crate) fn line(text: &str) -> Cow<'_, str> {
    match escaped(text, |_| false) {
        Cow::Borrowed(text) => cut(text),
        Cow::Owned(text) => cut(&text).into_owned().into(),
    }
}

/// The beginning and the end of what is too long.
fn cut(text: &str) -> Cow<'_, str> {
    let count = text.chars().count();
    if count <= LONGEST {
        return text.into();
    }
    let beginning: String = text.chars().take(LONGEST - END).collect();
    let end: String = text.chars().skip(count - END).collect();
    format!("{beginning} [... {} characters ...] {end}", count - LONGEST).into()
}

/// As many lines as there are, each as [`line`] but with its tabulators: what quotes an argument or a name of any length.
pub(crate) fn short_lines(text: &str) -> String {
    let plain = lines(text);
    plain.split('\n').map(cut).collect::<Vec<_>>().join("\n")
}

/// Several lines of any length: line breaks and tabulators stay, every other control character becomes its escape.
pub(crate) fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c == '\n' || c == '\t')
}

fn escaped(text: &str, stays: fn(char) -> bool) -> Cow<'_, str> {
    let is_bad = |c: char| is_control(c) && !stays(c);
    if !text.contains(is_bad) {
        return text.into();
    }
    let mut plain = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_bad(c) { plain.extend(c.escape_default()) } else { plain.push(c) }
    }
    plain.into()
}

/// Control characters, and those that turn the direction of writing round, which forge a line just as well.
fn is_control(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_become_escapes() {
        assert_eq!(line("a \"b\" ü 字"), "a \"b\" ü 字");
        assert_eq!(
            line("\u{1b}[2Jgone\r\nrank 0: done\u{9b}\u{202e}"),
            "\\u{1b}[2Jgone\\r\\nrank 0: done\\u{9b}\\u{202e}"
        );
        assert_eq!(lines("a\tb\n\u{7}c\r\n"), "a\tb\n\\u{7}c\\r\n");
    }

    #[test]
    fn a_long_line_keeps_its_beginning_and_its_end() {
        let text = format!("prompts.txt: {}; use fewer", "ü".repeat(5000));
        let short = line(&text);
        assert!(short.starts_with("prompts.txt: üü") && short.ends_with("üü; use fewer"), "{short}");
        assert!(short.contains(&format!(" [... {} characters ...] ", text.chars().count() - LONGEST)), "{short}");
        assert_eq!(line(&"x".repeat(LONGEST)), "x".repeat(LONGEST));
        let lines = short_lines(&format!("a\tb\n\u{7}\n{text}\nc"));
        assert_eq!(lines, format!("a\tb\n\\u{{7}}\n{}\nc", line(&text)));
    }
}
