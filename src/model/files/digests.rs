//! What a pipeline holds beside its transformer, as digests: two folders with the same make the same pictures of the same
//! latents and read the same of a prompt.

use super::{Weights, has_t5};
use crate::error::{Error, Result};
use crate::fs;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// The parts, as their folders are called.
const PARTS: [&str; 7] =
    ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"];

/// The files that a tokenizer is read of.
const OF_TOKENIZER: [&str; 5] =
    ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"];

/// Keys of a configuration that say where it comes from, beside those that begin with `_`.
const HISTORY: [&str; 3] = ["transformers_version", "torch_dtype", "dtype"];

/// The digest of each part in `folder` beside the transformer, by its name; of T5, where there is none, that of nothing.
/// Weights count as in [`Weights::digest`].
///
/// # Errors
/// [`Error::File`]: a part is absent or cannot be read.
pub fn digests(folder: &Path) -> Result<BTreeMap<&'static str, String>> {
    let has_t5 = has_t5(folder)?;
    let mut digests = BTreeMap::new();
    for name in PARTS {
        let (part, mut hasher) = (folder.join(name), blake3::Hasher::new());
        match name {
            _ if name.ends_with("_3") && !has_t5 => {}
            _ if name.starts_with("tokenizer") => {
                for file in OF_TOKENIZER.map(|file| part.join(file)).iter().filter(|file| fs::is_named(file)) {
                    let bytes = fs::read(file)?;
                    hasher.update(format!("{:?} {}\n", file.file_name(), bytes.len()).as_bytes()).update(&bytes);
                }
            }
            _ => {
                hasher.update(Weights::open(&part)?.digest().as_bytes());
                hasher.update(meaning(&part.join("config.json"))?.as_bytes());
            }
        }
        digests.insert(name, hasher.finalize().to_hex().to_string());
    }
    Ok(digests)
}

/// What a configuration says of its model, whoever has written it and in whichever order.
fn meaning(config: &Path) -> Result<String> {
    let text = fs::read_to_string(config)?;
    let json: Map<String, Value> = serde_json::from_str(&text)
        .map_err(|e| Error::File { path: config.to_path_buf(), message: format!("is not JSON: {e}") })?;
    let is_history = |key: &str| key.starts_with('_') || HISTORY.contains(&key);
    let keys: BTreeMap<_, _> = json.iter().filter(|(key, _)| !is_history(key)).collect();
    Ok(format!("{keys:?}"))
}
