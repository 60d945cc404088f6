//! No circles: a room of the library, and a file in a room, needs only what lies below it.
//!
//! The graph is read from the sources: every path that begins with `crate`, `super`, `self` or the name of a module beside
//! it, in `use` or in place. What a `mod.rs` only passes on counts as the file that it comes from. A `mod.rs` stands for
//! its folder: it puts the files together and holds what they share, so that uses between it and them do not count. Nor
//! do tests.
#![allow(clippy::unwrap_used)] // helpers of tests

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Circles that may stay, by one of their files, with the reason of each.
const EXCEPTIONS: [(&str, &str); 3] = [
    ("pipeline::config", "[model] asks the base model that it names, and a base model is made of [model]"),
    ("reward::config", "the list of rewards names their files, and stands beside the trait that they implement"),
    ("reward::loader", "a reward is built with what the loader shares, and the loader builds those of a list"),
];

/// A module by its names: `comm::tcp::control`.
type Name = Vec<String>;

/// A `use` that others may take: the name that it gives, and the path behind it.
type PassedOn = (String, Name);

/// What stands in one file.
#[derive(Default)]
struct Source {
    paths: Vec<Name>,
    passed_on: Vec<PassedOn>,
}

#[test]
fn no_room_and_no_file_needs_itself() {
    let modules = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    assert!(modules.len() > 200, "the sources were not found");
    let edges = edges(&modules);
    let rooms = between(&edges, |from, to| (from[0] != to[0]).then(|| (vec![from[0].clone()], vec![to[0].clone()])));
    let is_folder_of = |a: &Name, b: &Name| a.starts_with(b) || b.starts_with(a);
    let files =
        between(&edges, |from, to| (from[0] == to[0] && !is_folder_of(from, to)).then(|| (from.clone(), to.clone())));
    let mut found = Vec::new();
    for circle in circles(&rooms).into_iter().chain(circles(&files)) {
        let names: Vec<String> = circle.iter().map(|name| name.join("::")).collect();
        if !EXCEPTIONS.iter().any(|(file, _)| names.iter().any(|name| name == file)) {
            found.push(names.join(" -> "));
        }
    }
    assert!(found.is_empty(), "circles:\n{}", found.join("\n"));
}

/// The check finds what it is for, however it is written.
#[test]
fn circles_are_found() {
    let modules = |sources: &[(&str, &str)]| -> BTreeMap<Name, Source> {
        sources.iter().map(|(name, text)| (name_of(name), parse(text, &[]))).collect()
    };
    let found = |sources: &[(&str, &str)]| {
        let edges = edges(&modules(sources));
        circles(&between(&edges, |from, to| Some((from.clone(), to.clone())))).len()
    };
    assert_eq!(found(&[("a", "use crate::b::X;"), ("b", "fn f() { crate::a::g() }")]), 1);
    assert_eq!(
        found(&[("a", "use crate::b::X;"), ("b", "// use crate::a;\n#[cfg(test)]\nmod t { use crate::a; }")]),
        0
    );
    let passed_on = [("a", "pub use b::X;\npub use c::Y;"), ("a::b", "use super::Y;"), ("a::c", "use super::{X, z};")];
    assert_eq!(found(&passed_on), 1, "b and c need each other by way of a");
    let around =
        [("a", "use crate::{b::{X as Y}, d};"), ("b", "let x = \"\\\"{\"; use crate::c;"), ("c", "crate::a::x()")];
    assert_eq!(found(&around), 1, "of three");
    assert_eq!(found(&[("a", "use self::b::X;"), ("a::b", "use std::a; let a = a::b;")]), 0);
}

fn name_of(text: &str) -> Name {
    text.split("::").map(str::to_owned).collect()
}

/// Every module's source, but for the root and tests.
fn read(folder: &Path) -> BTreeMap<Name, Source> {
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_path_buf(), Name::new())];
    while let Some((folder, name)) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
            let own: Name = name.iter().cloned().chain([stem.clone()]).collect();
            match path.extension() {
                _ if stem == "tests" => (),
                None => folders.push((path, own)),
                Some(end) if end == "rs" && stem == "mod" => found.push((name.clone(), path)),
                Some(end) if end == "rs" && !(name.is_empty() && ["lib", "main"].contains(&&*stem)) => {
                    found.push((own, path));
                }
                Some(_) => (),
            }
        }
    }
    let names: Vec<Name> = found.iter().map(|(name, _)| name.clone()).collect();
    let parsed = found.into_iter().map(|(name, path)| {
        let children: Vec<&str> = names
            .iter()
            .filter(|own| own.len() == name.len() + 1 && own.starts_with(&name))
            .map(|own| &*own[name.len()])
            .collect();
        let source = parse(&std::fs::read_to_string(path).unwrap(), &children);
        (name, source)
    });
    parsed.collect()
}

/// Without strings, comments and modules of tests: their paths are none of ours.
fn stripped(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skip = match c {
            '"' => {
                let mut escaped = false;
                let end = rest[1..].find(|c| {
                    let ends = c == '"' && !escaped;
                    escaped = c == '\\' && !escaped;
                    ends
                });
                end.map_or(rest.len(), |end| end + 2)
            }
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '\'' if rest.starts_with("'\"'") || rest.starts_with("'{'") || rest.starts_with("'}'") => 3,
            '#' if rest.starts_with("#[cfg(test)]\nmod ") => block(rest),
            c => {
                out.push(c);
                c.len_utf8()
            }
        };
        rest = &rest[skip..];
    }
    out
}

/// The length of an inline module up to its closing brace, which stands at the beginning of a line as rustfmt puts it; of
/// one in a file of its own, of its line.
fn block(text: &str) -> usize {
    let line = text.match_indices('\n').nth(1).map_or(text.len(), |(end, _)| end);
    if text[..line].ends_with(';') { line } else { text.find("\n}").map_or(text.len(), |end| end + 2) }
}

/// The paths of a source, of a module with these children.
fn parse(text: &str, children: &[&str]) -> Source {
    let text = stripped(text);
    let mut source = Source::default();
    let (mut rest, mut previous) = (text.as_str(), "");
    while let Some(start) = rest.find(is_letter) {
        let (between, after) = rest.split_at(start);
        let (word, after) = after.split_at(after.find(|c| !is_letter(c)).unwrap_or(after.len()));
        let is_root = ["crate", "super", "self"].contains(&word) || children.contains(&word);
        let mut end = 0;
        if word == "use" && after.starts_with(' ') {
            end = after.find(';').unwrap_or(after.len());
            let is_passed_on = previous == "pub" && between == " " || between.trim() == ")";
            for (path, name) in tree(&after[..end], &[]) {
                if is_passed_on {
                    source.passed_on.push((name, path.clone()));
                }
                source.paths.push(path);
            }
        } else if is_root && after.starts_with("::") && !between.ends_with("::") {
            end = after.find(|c| !is_letter(c) && c != ':').unwrap_or(after.len());
            source.paths.push(name_of(&format!("{word}{}", after[..end].trim_end_matches(':'))));
        }
        (rest, previous) = (&after[end..], word);
    }
    source
}

fn is_letter(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The paths of a `use`, each with the name that it gives.
fn tree(text: &str, prefix: &[String]) -> Vec<(Name, String)> {
    let text = text.trim();
    let Some((head, inside)) = text.split_once('{') else {
        let (path, alias) = text.split_once(" as ").map_or((text, None), |(path, alias)| (path, Some(alias)));
        let mut path: Name =
            prefix.iter().cloned().chain(path.split("::").map(|name| name.trim().to_owned())).collect();
        if path.len() > 1 && path.last().is_some_and(|name| name == "self") {
            path.pop();
        }
        let name = alias.unwrap_or(path.last().unwrap()).trim().to_owned();
        return vec![(path, name)];
    };
    let head = head.trim().trim_end_matches("::").split("::").filter(|name| !name.is_empty());
    let prefix: Name = prefix.iter().cloned().chain(head.map(|name| name.trim().to_owned())).collect();
    let inside = inside.trim().strip_suffix('}').unwrap_or(inside);
    let (mut parts, mut depth, mut begun) = (Vec::new(), 0, 0);
    for (at, c) in inside.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&inside[begun..at]);
                begun = at + 1;
            }
            _ => (),
        }
    }
    parts.push(&inside[begun..]);
    parts.into_iter().filter(|part| !part.trim().is_empty()).flat_map(|part| tree(part, &prefix)).collect()
}

/// The module that a path of a module leads to, if it is one of ours.
fn resolve(modules: &BTreeMap<Name, Source>, from: &Name, path: &Name, depth: usize) -> Option<Name> {
    let mut here = match path[0].as_str() {
        "crate" => Name::new(),
        "self" | "super" => from.clone(),
        child => {
            let own: Name = from.iter().cloned().chain([child.to_owned()]).collect();
            modules.contains_key(&own).then_some(from.clone())?
        }
    };
    let mut rest = path.iter().skip_while(|name| ["crate", "self"].contains(&name.as_str())).peekable();
    while rest.next_if(|name| *name == "super").is_some() {
        here.pop();
    }
    while let Some(name) = rest.peek() {
        let next: Name = here.iter().cloned().chain([(*name).clone()]).collect();
        if !modules.contains_key(&next) {
            break;
        }
        here = next;
        rest.next();
    }
    let passed_on = modules.get(&here).zip(rest.next()).and_then(|(source, name)| {
        let (_, path) = source.passed_on.iter().find(|(given, _)| given == name)?;
        if depth == 0 { None } else { resolve(modules, &here, path, depth - 1) }
    });
    Some(passed_on.unwrap_or(here))
}

/// Which module needs which.
fn edges(modules: &BTreeMap<Name, Source>) -> BTreeSet<(Name, Name)> {
    let mut edges = BTreeSet::new();
    for (from, source) in modules {
        for path in &source.paths {
            let is_passed_on = source.passed_on.iter().any(|(_, passed)| passed == path);
            match resolve(modules, from, path, 8) {
                Some(to) if !to.is_empty() && to != *from && !(is_passed_on && to.starts_with(from)) => {
                    edges.insert((from.clone(), to));
                }
                _ => (),
            }
        }
    }
    edges
}

/// The edges that `f` keeps, between what it makes of them.
fn between(
    edges: &BTreeSet<(Name, Name)>,
    f: impl Fn(&Name, &Name) -> Option<(Name, Name)>,
) -> BTreeMap<Name, BTreeSet<Name>> {
    let mut graph: BTreeMap<Name, BTreeSet<Name>> = BTreeMap::new();
    for (from, to) in edges.iter().filter_map(|(from, to)| f(from, to)) {
        graph.entry(from).or_default().insert(to);
    }
    graph
}

/// A shortest circle through each module that lies on one, each circle once.
fn circles(graph: &BTreeMap<Name, BTreeSet<Name>>) -> Vec<Vec<Name>> {
    let mut found: BTreeMap<BTreeSet<Name>, Vec<Name>> = BTreeMap::new();
    for start in graph.keys() {
        let mut paths = std::collections::VecDeque::from([vec![start.clone()]]);
        let mut seen = BTreeSet::new();
        while let Some(path) = paths.pop_front() {
            for next in graph.get(path.last().unwrap()).into_iter().flatten() {
                if next == start {
                    found.entry(path.iter().cloned().collect()).or_insert_with(|| path.clone());
                    paths.clear();
                    break;
                }
                if seen.insert(next.clone()) {
                    paths.push_back(path.iter().cloned().chain([next.clone()]).collect());
                }
            }
        }
    }
    found.into_values().collect()
}
