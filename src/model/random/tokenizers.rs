//! Tokenizers that know single characters and no words, in the files of the real ones.

use super::write_json;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// What fills a short text up in the two CLIP tokenizers.
pub(super) const CLIP_PADS: [&str; 2] = [END, "!"];

/// What T5 reads in the place of the space before a word.
const WORD: char = '\u{2581}';

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// One character for every byte, in order.
fn bytes() -> BTreeSet<char> {
    ByteLevel::alphabet().into_iter().collect()
}

/// CLIP's: the bytes, the bytes at the end of a word, and from the end of the vocabulary the two ends of a text.
pub(super) fn clip(folder: &Path, pad: &str, vocabulary: u32) -> Result<()> {
    let words = bytes().into_iter().map(String::from).chain(bytes().into_iter().map(|c| format!("{c}</w>")));
    let mut ids: Map<String, Value> = words.enumerate().map(|(id, word)| (word, json!(id))).collect();
    ids.insert(START.into(), json!(vocabulary - 2));
    ids.insert(END.into(), json!(vocabulary - 1));
    write_json(folder, "vocab.json", &Value::Object(ids))?;
    let merges = folder.join("merges.txt");
    fs::write(&merges, "#version: 0.2\n").map_err(Error::io(&merges))?;
    let config = json!({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": START, "eos_token": END,
        "unk_token": END, "pad_token": pad,
    });
    write_json(folder, "tokenizer_config.json", &config)
}

/// T5's: padding, the end of a text, what is unknown, what stands before each word, and the visible characters of ASCII.
/// Of the file transformers takes the vocabulary alone, as pieces with scores.
pub(super) fn t5(folder: &Path) -> Result<()> {
    let special = ["<pad>", "</s>", "<unk>"];
    let added = |(id, word): (usize, &str)| {
        json!({"id": id, "content": word, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    let pieces = special.into_iter().map(|word| json!([word, 0.0]));
    let characters = std::iter::once(WORD).chain('!'..='~').map(|c| json!([c, -1.0]));
    let words = json!({"type": "Metaspace", "replacement": WORD, "prepend_scheme": "always", "split": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": words,
        "added_tokens": special.into_iter().enumerate().map(added).collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, words]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 2, "byte_fallback": false,
                  "vocab": pieces.chain(characters).collect::<Vec<_>>()},
    });
    write_json(folder, "tokenizer.json", &tokenizer)?;
    let config = json!({
        "tokenizer_class": "T5TokenizerFast", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
    });
    write_json(folder, "tokenizer_config.json", &config)
}
