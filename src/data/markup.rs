//! What is written in another language than lines of prompts: YAML, TOML, XML, Markdown, tables with `|`. A line of it would
//! be a prompt like any other, with its dashes and keys.

use super::lines::lines;

/// Ends of names that say that a file is no list of lines.
pub(super) fn is_extension(name: &str) -> bool {
    ["yaml", "yml", "toml", "xml", "html", "htm", "pdf", "rtf", "md", "rst", "ini", "xlsx", "docx", "sql"]
        .contains(&name)
}

/// What a line surely is that no prompt is: what to do about it.
pub(super) fn of_line(line: &str) -> Option<&'static str> {
    let small = line.to_lowercase();
    if ["<!doctype html", "<html"].iter().any(|start| small.starts_with(start)) {
        return Some("is a web page; download the file itself");
    }
    if ["<?xml", "<!--", "<!doctype", "<prompt"].iter().any(|start| small.starts_with(start)) {
        return Some("is XML or HTML; write each prompt on a line of its own");
    }
    if is_key(&small) {
        return Some(
            "names a key, as YAML and TOML do; write the prompts alone, or as JSON lines, {\"prompt\": \"...\"}",
        );
    }
    if is_rule(line) {
        return Some("is a rule of YAML or Markdown; write each prompt on a line of its own");
    }
    is_header(&small).then_some("is the header of a table with |; write it with commas or tabs")
}

/// What all lines together surely are: what to do about it.
pub(super) fn of_all(text: &str) -> Option<&'static str> {
    let all = |is: fn(&str) -> bool| lines(text).all(|(_, line)| is(line));
    if all(|line| line.starts_with("- ") || line.starts_with("* ")) {
        return Some("begins with the mark of a list, as all lines do; take it away");
    }
    let mut numbers = lines(text).map(|(_, line)| numbered(line));
    if (1..).zip(numbers.by_ref()).all(|(wanted, number)| number == Some(wanted)) {
        return Some("is numbered, as all lines are; take the numbers away");
    }
    let are_several = lines(text).count() > 1;
    if are_several && all(|line| line.len() > 1 && line.starts_with('\'') && line.ends_with('\'')) {
        return Some("is in single quotes, as all lines are; take them away");
    }
    if all(|line| line.len() > 1 && line.starts_with('|') && line.ends_with('|')) {
        return Some("is a row of a table with |, as all lines are; write it with commas or tabs");
    }
    None
}

/// `prompt: a cat`, `- prompts:`, `"prompt" = "a cat"`, `[[prompts]]`.
fn is_key(line: &str) -> bool {
    let line = line.strip_prefix("- ").unwrap_or(line).trim_start();
    if ["[[prompt]]", "[[prompts]]", "[prompt]", "[prompts]"].contains(&line) {
        return true;
    }
    let after = ["prompts", "prompt"].iter().find_map(|key| line.trim_start_matches(['"', '\'']).strip_prefix(key));
    after.is_some_and(|after| after.trim_start_matches(['"', '\'', ' ']).starts_with([':', '=']))
}

/// `---`, `...`, `|---|:--:|`.
fn is_rule(line: &str) -> bool {
    line == "..." || (line.contains("--") && line.chars().all(|c| "|-: ".contains(c)))
}

/// `id|prompt`, `| prompt | tag |`.
fn is_header(line: &str) -> bool {
    let is_name = |name: &str| ["prompt", "prompts", "caption"].contains(&name.trim());
    line.contains('|') && line.split('|').any(is_name)
}

/// The number of `3. a cat` or `3) a cat`.
fn numbered(line: &str) -> Option<u64> {
    let end = line.find(|c: char| !c.is_ascii_digit())?;
    let (number, rest) = line.split_at(end);
    (rest.starts_with(". ") || rest.starts_with(") ")).then(|| number.parse().ok())?
}
