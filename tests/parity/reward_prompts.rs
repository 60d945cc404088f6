//! Prompt files as they are published, and prompts drawn in GenEval's manner.

use flowrl_dist::data::geneval::{Record, Tag, train_records};
use flowrl_dist::data::{Format, PromptSet, Split};
use std::collections::{HashMap, HashSet};
use std::path::Path;

fn folder(name: &str) -> String {
    format!("{}/tests/fixtures/data/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn eval(name: &str) -> PromptSet {
    PromptSet::load(&folder(name), Split::Eval, Format::Auto).unwrap()
}

#[test]
fn published_folders_are_read_whole_with_their_metadata() {
    let ocr = eval("ocr"); // no final newline
    assert_eq!(ocr.len(), 12);
    assert!(ocr.prompts.iter().all(|prompt| prompt.text.contains('"') && prompt.metadata.is_none()));
    assert!(ocr.prompts[0].text.starts_with("A high-fashion runway with a sleek, modern backdrop displaying \"Spring"));

    let drawbench = eval("drawbench");
    assert_eq!(drawbench.len(), 14);
    assert_eq!(&*drawbench.prompts[7].text, "Artophagous.");

    let geneval = eval("geneval");
    assert_eq!(geneval.len(), 19);
    for (index, prompt) in geneval.prompts.iter().enumerate() {
        assert_eq!(prompt.index, index);
        let metadata = prompt.metadata.as_ref().unwrap();
        assert_eq!(metadata["prompt"], &*prompt.text);
        let record = Record::of(metadata).unwrap().unwrap();
        assert_eq!(record.prompt(), &*prompt.text);
        let again: serde_json::Value = serde_json::from_str(&record.line().unwrap()).unwrap();
        assert_eq!(&again, &serde_json::Value::from((**metadata).clone()));
    }
    // A prompt that stands twice in a file is two groups with noise of their own.
    assert_eq!(geneval.prompts[0].text, geneval.prompts[18].text);
}

#[test]
fn a_format_can_be_forced() {
    let path = folder("geneval/test_metadata.jsonl");
    let lines = PromptSet::from_file(&path, Format::Text).unwrap();
    assert!(lines.prompts[0].text.starts_with("{\"tag\"") && lines.prompts[0].metadata.is_none());
    let wrong = PromptSet::from_file(folder("drawbench/test.txt"), Format::Jsonl).unwrap_err().to_string();
    assert!(wrong.contains("line 1: ") && wrong.contains("write {\"prompt\""), "{wrong}");
    let absent = PromptSet::load(&folder("ocr"), Split::Train, Format::Auto).unwrap_err().to_string();
    assert!(absent.contains("holds none of train_metadata.jsonl, train.jsonl, train.txt"), "{absent}");
}

#[test]
fn broken_records_are_named() {
    let record = |line: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.jsonl");
        std::fs::write(&path, line).unwrap();
        let prompts = PromptSet::from_file(&path, Format::Auto).unwrap().prompts;
        Record::of(prompts[0].metadata.as_ref().unwrap())
    };
    assert_eq!(record(r#"{"prompt": "a", "source": "b"}"#).unwrap(), None);
    for (line, what) in [
        (r#"{"prompt": "a", "tag": "colours", "include": []}"#, "unknown variant `colours`"),
        (r#"{"prompt": "a", "tag": "colors", "include": [{"class": "cat", "count": 0}]}"#, "a count of 0"),
        (
            r#"{"prompt": "a", "tag": "position", "include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}"#,
            "does not stand before",
        ),
    ] {
        let error = record(line).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn drawn_prompts_have_the_shares_and_leave_the_benchmark_out() {
    let without = eval("geneval");
    let records = train_records(20_000, 1, &without.prompts).unwrap();
    let mut counts: HashMap<Tag, usize> = HashMap::new();
    records.iter().for_each(|record| *counts.entry(record.tag).or_default() += 1);
    for (tag, share) in
        [(Tag::Position, 7.0), (Tag::Counting, 5.0), (Tag::ColorAttr, 3.0), (Tag::Colors, 1.0), (Tag::TwoObject, 1.0)]
    {
        let (wanted, drawn): (f64, f64) = (share / 17.0, counts[&tag] as f64 / 20_000.0);
        let deviation = (wanted * (1.0 - wanted) / 20_000.0).sqrt();
        assert!((drawn - wanted).abs() < 4.0 * deviation, "{tag:?}: {drawn}, not {wanted}");
    }

    let banned: HashSet<&str> = without.prompts.iter().map(|prompt| &*prompt.text).collect();
    let mut objects = HashSet::new();
    for record in &records {
        let mut swapped = record.clone();
        swapped.include.reverse();
        assert!(!banned.contains(record.prompt().as_str()));
        assert!(record.tag == Tag::Position || !banned.contains(swapped.prompt().as_str()));
        let classes: Vec<&str> = record.include.iter().map(|object| object.class.as_str()).collect();
        assert!(classes.len() == 1 || classes[0] != classes[1], "{record:?}");
        assert!(record.include.iter().all(|object| object.colour.is_none() || object.class != "person"));
        if let [first, second] = &record.include[..] {
            assert!(first.colour.is_none() || first.colour != second.colour, "{record:?}");
        }
        objects.extend(classes.into_iter().map(str::to_string));
    }
    assert_eq!(objects.len(), 80, "every object is drawn");
    assert_eq!(records, train_records(20_000, 1, &without.prompts).unwrap());
    assert_ne!(records, train_records(20_000, 2, &without.prompts).unwrap());
    assert_eq!(records[..50], train_records(50, 1, &without.prompts).unwrap(), "a shorter set is its beginning");
}

#[test]
fn the_program_writes_what_the_reader_reads() {
    let folder_of_run = tempfile::tempdir().unwrap();
    let out = folder_of_run.path().join("train_metadata.jsonl");
    let benchmark = folder("geneval/test_metadata.jsonl");
    let arguments = ["prompts", "geneval", "-n", "40", "--seed", "7", "--without", &benchmark, "--out"];
    let program = assert_cmd::Command::new(env!("CARGO_BIN_EXE_flowrl-dist")).args(arguments).arg(&out).assert();
    program.success().stdout(format!("40 prompts in {}\n", out.display()));
    let set = PromptSet::load(folder_of_run.path().to_str().unwrap(), Split::Train, Format::Auto).unwrap();
    let records = train_records(40, 7, &PromptSet::from_file(Path::new(&benchmark), Format::Auto).unwrap().prompts);
    for (prompt, record) in set.prompts.iter().zip(records.unwrap()) {
        assert_eq!(Record::of(prompt.metadata.as_ref().unwrap()).unwrap(), Some(record));
    }
}
