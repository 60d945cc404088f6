use super::pipeline::{Pipeline, fixture};
use flowrl_dist::model::text::Tokenizer;
use std::fs;

/// The ids of transformers' tokenizers: lengths, truncation, padding, white space, case, accents, composed and not,
/// other scripts, bytes without a token, special tokens in the text.
#[test]
fn ids_are_those_of_transformers() {
    let folder = fixture("tokenizers_micro");
    let cases: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(folder.join("cases.json")).unwrap()).unwrap();
    let texts: Vec<&str> = cases["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    let mut compared = 0;
    for (key, recorded) in cases.as_object().unwrap().iter().filter(|(key, _)| *key != "texts") {
        let (name, length) = key.split_once('.').unwrap();
        let tokenizer = Tokenizer::open(&folder.join(name), length.parse().unwrap()).unwrap();
        for (text, ids) in texts.iter().zip(recorded.as_array().unwrap()) {
            let ids: Vec<u32> = ids.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(tokenizer.encode(text).unwrap(), ids, "{key}: {text:?}");
            compared += 1;
        }
    }
    assert_eq!(compared, 5 * texts.len());
}

#[test]
fn a_text_that_is_cut_is_said_to_be() {
    let tokenizer = Tokenizer::open(&fixture("tokenizers_micro/tokenizer"), 77).unwrap();
    assert!(!tokenizer.cuts(&"cat ".repeat(75)).unwrap());
    assert!(tokenizer.cuts(&"cat ".repeat(76)).unwrap());
}

fn failure(pipeline: &Pipeline, length: usize) -> String {
    Tokenizer::open(&pipeline.path("tokenizer"), length).unwrap_err().to_string()
}

#[test]
fn what_is_missing_is_named() {
    let pipeline = Pipeline::new();
    assert!(failure(&pipeline, 2).contains("a text of 2 tokens holds no word"));

    let config = fs::read_to_string(pipeline.path("tokenizer/tokenizer_config.json")).unwrap();
    let other = config.replace(r#""pad_token": "<|endoftext|>""#, r#""pad_token": "<gone>""#);
    fs::write(pipeline.path("tokenizer/vocab.json"), r#"{"a": 0}"#).unwrap();
    assert!(failure(&pipeline, 77).contains("holds a tokenizer that cannot be read"));
    fs::copy(fixture("tokenizers_micro/tokenizer/vocab.json"), pipeline.path("tokenizer/vocab.json")).unwrap();
    fs::write(pipeline.path("tokenizer/tokenizer_config.json"), other).unwrap();
    assert!(failure(&pipeline, 77).contains("has the pad token <gone>, which is not in its vocabulary"));
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        fs::remove_file(pipeline.path("tokenizer").join(name)).unwrap();
    }
    assert!(failure(&pipeline, 77).contains("names no pad token"));

    fs::remove_file(pipeline.path("tokenizer/merges.txt")).unwrap();
    assert!(failure(&pipeline, 77).contains("holds no tokenizer; give a folder with tokenizer.json or vocab.json"));
    fs::write(pipeline.path("tokenizer/spiece.model"), "").unwrap();
    assert!(failure(&pipeline, 77).contains("AutoTokenizer.from_pretrained"));
}
