//! Tokenizers that know bytes and no words, in the files of the real ones.

use super::write_json;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// What fills a short text up in the two CLIP tokenizers.
pub(super) const CLIP_PADS: [&str; 2] = [END, "!"];

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

/// T5's: padding, the end of a text, what is unknown, and the bytes.
pub(super) fn t5(folder: &Path) -> Result<()> {
    let special = ["<pad>", "</s>", "<unk>"];
    let words = special.into_iter().map(String::from).chain(bytes().into_iter().map(String::from));
    let ids: Map<String, Value> = words.enumerate().map(|(id, word)| (word, json!(id))).collect();
    let added = |(id, word): (usize, &str)| {
        json!({"id": id, "content": word, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
        "added_tokens": special.into_iter().enumerate().map(added).collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": ids, "merges": []},
    });
    write_json(folder, "tokenizer.json", &tokenizer)?;
    let config = json!({
        "tokenizer_class": "T5TokenizerFast", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
    });
    write_json(folder, "tokenizer_config.json", &config)
}
