//! Prompt files of every make: the prompts that they hold, or the line that is refused.

use super::*;
use crate::error::Error;
use std::sync::Arc;

/// What comes of a file of this name.
fn read(name: &str, content: impl AsRef<[u8]>) -> Result<PromptSet> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    PromptSet::from_file(&path, Format::Auto)
}

#[test]
fn prompts_are_found_by_what_a_file_holds() {
    let lines = "{\"prompt\": \"a red boat\", \"tag\": \"x\"}\n{\"prompt\": \"a blue car\", \"tag\": \"y\"}\n";
    let two = ["a red boat", "a blue car"];
    let drawbench = "Prompts,Category\n\"A red colored car, shiny.\",Colors\nA black colored car.,Colors\n";
    let cars = ["A red colored car, shiny.", "A black colored car."];
    let cases: [(&str, &str, &[&str]); 25] = [
        ("a.ndjson", lines, &two),
        ("a_json_lines", lines, &two),
        ("a.txt", lines, &two),
        ("a.txt", &format!("\u{feff}{}", lines.replace('\n', "\r\n\r\n")), &two),
        ("a.jsonl", "\"a red boat\"\n\"a blue car\"", &two),
        ("a.json", "[\n  \"a red boat\",\n  \"a blue car\"\n]\n", &two),
        ("a.txt", "[{\"prompt\": \"a red boat\"}, {\"prompt\": \"a blue car\", \"tag\": \"y\"}]", &two),
        ("drawbench.txt", drawbench, &cars),
        ("drawbench.csv", &drawbench.replace(',', ";"), &["A red colored car; shiny.", "A black colored car."]),
        ("a.tsv", "id\tprompt\n1\ta \"red\" boat\n2\ta, b; c\n", &["a \"red\" boat", "a, b; c"]),
        ("a.csv", ",prompt\n0,\"a sign \"\"OPEN\"\"\nat night\"\n1,a cat\n", &["a sign \"OPEN\"\nat night", "a cat"]),
        ("a.txt", "prompt\na cat, sitting\n\"a dog, \"\"REX\"\"\"\n", &["a cat, sitting", "a dog, \"REX\""]),
        // Prompts that only look like something else.
        ("a.txt", "[photo] a cat\n", &["[photo] a cat"]),
        ("a.txt", "[a] b [c]\n\n{neon|wood} sign\n", &["[a] b [c]", "{neon|wood} sign"]),
        ("a.txt", "\"Hello\" on a sign\n\"OPEN\"\n", &["\"Hello\" on a sign", "\"OPEN\""]),
        ("a.txt", "\"OPEN\"\n", &["\"OPEN\""]),
        ("a.txt", "a cat, a dog\na fish, a bird\n", &["a cat, a dog", "a fish, a bird"]),
        (
            "a.txt",
            "\"A\", \"B\" on a wall\n\"C\", \"D\" on a wall",
            &["\"A\", \"B\" on a wall", "\"C\", \"D\" on a wall"],
        ),
        ("a.txt", "#1 dad mug\ra 3;4 lens\r", &["#1 dad mug", "a 3;4 lens"]),
        ("a.txt", "prompt engineering class\n3. a cat\n", &["prompt engineering class", "3. a cat"]),
        ("a.txt", "- a cat\na dog\n", &["- a cat", "a dog"]),
        ("a.txt", "<lora:ink:0.8> a cat\na | b\n", &["<lora:ink:0.8> a cat", "a | b"]),
        ("a.txt", "'OPEN' sign\na '5' on a door, 'open'\n", &["'OPEN' sign", "a '5' on a door, 'open'"]),
        ("a.txt", "12. a cat\n1984 - a film\n", &["12. a cat", "1984 - a film"]),
        ("a", "text, logo, minimal\na, b, c\n", &["text, logo, minimal", "a, b, c"]),
    ];
    for (name, content, prompts) in cases {
        let set = read(name, content).unwrap_or_else(|e| panic!("{name} {content:?}: {e}"));
        assert_eq!(set.texts(), prompts, "{name} {content:?}");
        assert!(set.prompts.iter().enumerate().all(|(place, prompt)| prompt.index == place));
    }
}

#[test]
fn what_is_not_clear_is_refused_with_its_line() {
    let utf16: Vec<u8> = "\u{feff}a cat\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let cases: [(&str, &[u8], &[&str]); 55] = [
        ("a.txt", &utf16, &["is UTF-16 text; write its prompts into a UTF-8 text file"]),
        ("a.txt", &utf16[2..], &["line 1: holds a zero byte: UTF-16"]),
        ("a.txt", b"a cat\nna\xefve\n", &["line 2: not UTF-8; save the file as UTF-8"]),
        ("a.parquet", b"PAR1\x15\x04", &["is a Parquet file"]),
        ("a.txt", b"\n \n", &["no prompt in this file"]),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", &["line 1: is a pointer of Git LFS"]),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>\n", &["line 1: expected value"]),
        ("a.txt", b"<!DOCTYPE html>\n<html>\n", &["line 1: is a web page"]),
        ("a.bz2", b"BZh91AY&SY\x00\x01", &["is a bzip2 file"]),
        ("a.txt", b"%PDF-1.7\n", &["is a PDF document; write its prompts into a UTF-8 text file"]),
        ("a.txt", b"{\\rtf1\\ansi a cat}\n", &["is an RTF document"]),
        ("a.txt", b"<?xml version=\"1.0\"?>\n<prompts/>\n", &["line 1: is XML or HTML"]),
        ("a.txt", b"<!-- x --><html>\n", &["line 1: is XML or HTML"]),
        ("a.txt", b"<prompts>\n<prompt>a cat</prompt>\n", &["line 1: is XML or HTML"]),
        // YAML, TOML, Markdown.
        ("a.yaml", b"a cat\n", &["line 1: the file's name ends in .yaml", "data.format = \"text\""]),
        ("a.YML", b"a cat\n", &["ends in .yml"]),
        ("a.toml", b"a cat\n", &["ends in .toml"]),
        ("a.txt", b"- prompt: a cat\n  tag: x\n", &["line 1: names a key, as YAML and TOML do", "data.format"]),
        ("a.txt", b"prompts:\n  - a cat\n", &["line 1: names a key"]),
        ("a.txt", b"# hm\nprompts:\n  - a cat\n", &["line 1: looks like a comment"]),
        ("a.txt", b"---\n- a cat\n", &["line 1: is a rule of YAML or Markdown"]),
        ("a.txt", b"prompt: a cat\nprompt: a dog\n", &["line 1: names a key"]),
        ("a.txt", b"a cat\nPrompt: a dog\n", &["line 2: names a key"]),
        ("a.txt", b"prompts = [\n  \"a cat\",\n]\n", &["line 1: names a key"]),
        ("a.txt", b"[[prompts]]\nprompt = \"a cat\"\n", &["line 1: names a key"]),
        ("a.txt", b"[data]\nprompt = \"a cat\"\n", &["line 2: names a key"]),
        ("a.txt", b"- a cat\n- a dog\n", &["line 1: begins with the mark of a list, as all lines do"]),
        ("a.txt", b"* a cat\n", &["line 1: begins with the mark of a list"]),
        ("a.txt", b"1. a cat\n2. a dog\n", &["line 1: is numbered, as all lines are"]),
        ("a.txt", b"1) a cat\n", &["line 1: is numbered"]),
        ("a.txt", b"'a cat'\n'a dog'\n", &["line 1: is in single quotes, as all lines are"]),
        ("a.txt", b"id|prompt\n1|a cat\n", &["line 1: is the header of a table with |; write it with commas"]),
        ("a.txt", b"| Prompt | Tag |\n|---|---|\n| a cat | x |\n", &["line 1: is the header of a table with |"]),
        ("a.txt", b"| a cat | x |\n| a dog | y |\n", &["line 1: is a row of a table with |"]),
        // More than one way.
        ("a.txt", b"a cat\n\n{\"prompt\": \"a dog\"}\n", &["line 3: is a JSON object among lines of text"]),
        ("a.txt", b"{\"prompt\": \"a dog\"}\na cat\n", &["line 2: expected value; write {\"prompt\": \"...\"}"]),
        ("a.jsonl", b"{\"prompt\": \"a dog\"}\n\"a cat\"\n", &["line 2: \"a cat\" among others of another kind"]),
        ("a.json", b"[\"a dog\", {\"prompt\": \"a\"}]", &["entry 2: {\"prompt\":\"a\"} among others"]),
        ("a.jsonl", b"a cat\n", &["line 1: expected value", "write {\"prompt\""]),
        ("a.txt", b"# my prompts\na cat\n", &["line 1: looks like a comment", "data.format = \"text\""]),
        ("a.txt", b"a cat\n// a dog\n", &["line 2: looks like a comment"]),
        // JSON that is none, or says no prompt.
        ("a.txt", b"{'prompt': 'a dog'}\n", &["line 1: key must be a string; write {\"prompt\""]),
        ("a.txt", b"{\n  \"prompt\": \"a\"\n}\n", &["line 1: begins an object of several lines", "jq -c"]),
        ("a.txt", b"[\"a cat\",\n\"a dog\"\n", &["line 2: EOF while parsing a list: this is not one JSON list"]),
        ("a.txt", b"{\"caption\": \"a dog\"}\n", &["line 1: there is no field \"prompt\""]),
        (
            "a.jsonl",
            b"{\"prompt\": \"a\"}\n{\"prompt\": \"a\", \"prompt\": \"b\"}\n",
            &["line 2: names the key \"prompt\" twice; keep one of them"],
        ),
        (
            "a.json",
            b"[{\"prompt\": \"a\"},\n{\"prompt\": \"b\", \"include\": [{\"class\": \"x\", \"class\": \"y\"}]}]",
            &["line 2: names the key \"class\" twice; keep one of them"],
        ),
        ("a.txt", b"{\"prompt\": \"a\", \"negative_prompt\": 3}\n", &["line 1: the negative_prompt is 3, not text"]),
        // Tables.
        ("a.csv", b"id,caption\n1,a cat\n", &["line 1: names no column \"prompt\""]),
        ("a.txt", b"id,caption\n1,a cat\n", &["line 1: looks like the first of a table of 2 columns"]),
        ("a.txt", b"a cat\t1\na dog\t2\n", &["line 1: looks like the first of a table of 2 columns"]),
        ("a.txt", b"a cat,Animals\n\"a dog, big\",Animals\n", &["line 1: looks like the first of a table"]),
        (
            "a.txt",
            b"Prompts,Category\na cat,Animals\na dog, big,Animals\n",
            &["line 3: has 3 columns, and the header 2"],
        ),
        ("a.csv", b"prompt,id\n\"a cat,1\na dog,2\n", &["line 2: opens a double quote that is never closed"]),
        ("a.csv", b"prompt,id,id\na,1,2\n", &["line 1: names the column \"id\" twice"]),
    ];
    for (name, content, parts) in cases {
        let message = match read(name, content) {
            Err(error @ Error::File { .. }) => error.to_string(),
            other => panic!("{name} {content:?}: {other:?}"),
        };
        assert!(!message.contains('\n') && parts.iter().all(|part| message.contains(part)), "{content:?}: {message}");
    }
    let quoted = read("a.txt", "\"a red boat\"\n\"a blue car\"\n").unwrap_err().to_string();
    assert!(quoted.contains("line 1: is in double quotes, as all lines are; take them away, or set data"), "{quoted}");
}

#[test]
fn a_negative_prompt_is_the_prompts_own_and_other_keys_are_kept() {
    let negatives = |name: &str, content: &str| -> Vec<Option<Arc<str>>> {
        read(name, content).unwrap().prompts.into_iter().map(|prompt| prompt.negative).collect()
    };
    let some = Some("blur, noise".into());
    let lines =
        "{\"prompt\": \"a\", \"negative_prompt\": \" blur, noise\"}\n{\"prompt\": \"b\", \"negative_prompt\": null}";
    assert_eq!(negatives("a.jsonl", lines), [some.clone(), None]);
    let table = "id,Prompt,Negative_Prompt\n1,a,\"blur, noise\"\n2,b,\n";
    assert_eq!(negatives("a.txt", table), [some, None]);
    for header in ["id,prompt,Negative Prompt", "id,prompt,negative-prompt"] {
        assert_eq!(negatives("a.csv", &format!("{header}\n1,a,blur\n")), [Some("blur".into())], "{header}");
    }
    let set = read("a.txt", table).unwrap();
    let metadata = serde_json::json!({"id": "1", "prompt": "a", "negative_prompt": "blur, noise"});
    assert_eq!(set.prompts[0].metadata.as_deref(), metadata.as_object());
    assert_eq!(set.prompts[0].texts(true).collect::<Vec<_>>(), ["a", "blur, noise"]);
    assert_eq!(set.prompts[0].texts(false).collect::<Vec<_>>(), ["a"]);
}
