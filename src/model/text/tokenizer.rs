//! Prompts to tokens, as transformers' tokenizers do it.

use crate::error::{Error, Result};
use crate::fs;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior, TruncationParams};

/// A tokenizer whose texts all have the same number of tokens.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    folder: PathBuf,
    inner: tokenizers::Tokenizer,
    length: usize,
    padding: u32,
}

/// A text with plain quotes in the place of typographic ones: what ftfy, which open_clip cleans its prompts with, makes of
/// them. transformers' fast tokenizers leave them as they are.
pub fn uncurl(text: &str) -> String {
    let plain = |c: char| match c {
        '\u{02bc}' | '\u{2018}'..='\u{201b}' => '\'',
        '\u{201c}'..='\u{201f}' => '"',
        other => other,
    };
    text.chars().map(plain).collect()
}

/// CLIP's first and last token of a text.
const CLIP_ENDS: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];

impl Tokenizer {
    /// The tokenizer in `folder`: its tokenizer.json, or CLIP's vocab.json and merges.txt; the token that fills a text
    /// up to `length` is the pad token of tokenizer_config.json.
    ///
    /// # Errors
    /// [`Error::File`] if something is missing or damaged; [`Error::Usage`] if `length` is too short for a text.
    pub fn open(folder: &Path, length: usize) -> Result<Self> {
        let error = |message: String| Error::File { path: folder.to_path_buf(), message };
        let damaged = |e: tokenizers::Error| error(format!("holds a tokenizer that cannot be read: {e}"));
        let has = |name: &str| fs::is_named(&folder.join(name));
        let mut inner = if has("tokenizer.json") {
            tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).map_err(damaged)?
        } else if has("vocab.json") && has("merges.txt") {
            clip(folder).map_err(damaged)?
        } else if has("spiece.model") {
            return Err(error(format!(
                "holds spiece.model but no tokenizer.json; make it in Python: \
                 transformers.AutoTokenizer.from_pretrained({folder:?}).save_pretrained({folder:?})"
            )));
        } else {
            return Err(error(
                "holds no tokenizer; give a folder with tokenizer.json or vocab.json and merges.txt".into(),
            ));
        };

        let special = Special::read(folder)?;
        let Some(pad) = special.padding else {
            return Err(error("names no pad token; its tokenizer_config.json has to".into()));
        };
        let Some(padding) = inner.token_to_id(&pad) else {
            return Err(error(format!("has the pad token {pad}, which is not in its vocabulary; download it again")));
        };
        inner.add_special_tokens(special.tokens).map_err(damaged)?;
        inner.with_padding(None);
        let added = inner.get_post_processor().map_or(0, |p| tokenizers::PostProcessor::added_tokens(p, false));
        if length <= added {
            return Err(Error::Usage(format!("a text of {length} tokens holds no word; take more than {added}")));
        }
        let truncation = TruncationParams { max_length: length, ..Default::default() };
        inner.with_truncation(Some(truncation)).map_err(damaged)?;
        Ok(Self { folder: folder.to_path_buf(), inner, length, padding })
    }

    /// Refuses a tokenizer that makes tokens which an encoder that knows `vocabulary` of them does not.
    ///
    /// # Errors
    /// [`Error::File`] with its largest token.
    pub fn check(&self, vocabulary: usize) -> Result<()> {
        let largest = self.inner.get_vocab(true).into_values().max().unwrap_or(0);
        if (largest as usize) < vocabulary {
            return Ok(());
        }
        let message = format!(
            "makes tokens up to {largest}, and its encoder knows {vocabulary}; take the tokenizer that belongs to the encoder"
        );
        Err(Error::File { path: self.folder.clone(), message })
    }

    /// The tokens of a text, its end cut off where it is too long, filled up where it is short; always the same number.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokens(text)?.get_ids().to_vec();
        ids.resize(self.length, self.padding);
        Ok(ids)
    }

    /// Whether the text has more tokens than there is room for.
    pub fn cuts(&self, text: &str) -> Result<bool> {
        Ok(!self.tokens(text)?.get_overflowing().is_empty())
    }

    fn tokens(&self, text: &str) -> Result<tokenizers::Encoding> {
        let encoding = self.inner.encode_fast(text, true);
        encoding.map_err(|e| Error::Failed(format!("the text {text:?} cannot be tokenized: {e}")))
    }
}

/// CLIP's byte-pair encoding of lower-case words, as transformers' `CLIPConverter` builds it.
fn clip(folder: &Path) -> tokenizers::Result<tokenizers::Tokenizer> {
    let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let [start, end] = CLIP_ENDS;
    let bpe = BPE::from_file(&file("vocab.json"), &file("merges.txt"))
        .unk_token(end.into())
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".into())
        .build()?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
    tokenizer.with_normalizer(Some(Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()])))?;
    let words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
    let words = Split::new(SplitPattern::Regex(words.into()), SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![words.into(), bytes.into()])));
    let id = |token: &str| {
        let id = tokenizer.token_to_id(token).ok_or_else(|| format!("vocab.json lacks {token}"))?;
        Ok::<_, tokenizers::Error>((token.to_owned(), id))
    };
    let ends = RobertaProcessing::new(id(end)?, id(start)?).trim_offsets(false).add_prefix_space(false);
    tokenizer.with_post_processor(Some(ends));
    Ok(tokenizer)
}

/// What tokenizer_config.json and special_tokens_map.json say.
struct Special {
    /// Tokens that are found in a text before it is split into words. In CLIP-G's tokenizer "!" is one of them.
    tokens: Vec<AddedToken>,
    padding: Option<String>,
}

impl Special {
    fn read(folder: &Path) -> Result<Self> {
        let mut special = Self { tokens: Vec::new(), padding: None };
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = folder.join(name);
            if !fs::is_named(&path) {
                continue;
            }
            let text = fs::read_to_string(&path)?;
            let json: Value = serde_json::from_str(&text)
                .map_err(|e| Error::File { path, message: format!("is not JSON ({e}); download it again") })?;
            special.take(&json);
        }
        Ok(special)
    }

    /// Adds what one of the two files says and none before it said.
    fn take(&mut self, json: &Value) {
        let decoder = json.get("added_tokens_decoder").and_then(Value::as_object);
        let named = ["bos_token", "eos_token", "unk_token", "pad_token"].iter().filter_map(|key| json.get(key));
        for token in decoder.into_iter().flat_map(|tokens| tokens.values()).chain(named) {
            if let Some(token) = added_token(token)
                && self.tokens.iter().all(|known| known.content != token.content)
            {
                self.tokens.push(token);
            }
        }
        let padding = json.get("pad_token").and_then(added_token).map(|token| token.content);
        self.padding = self.padding.take().or(padding);
    }
}

/// A token as those files write it: its text alone, or with how it is looked for.
fn added_token(json: &Value) -> Option<AddedToken> {
    if let Some(content) = json.as_str() {
        return Some(AddedToken::from(content, true));
    }
    let flag = |key: &str| json.get(key).and_then(Value::as_bool).unwrap_or(false);
    let token = AddedToken::from(json.get("content")?.as_str()?, true);
    let token = token.single_word(flag("single_word")).normalized(flag("normalized"));
    Some(token.lstrip(flag("lstrip")).rstrip(flag("rstrip")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ftfy 6.3.1, `fix_text`.
    #[test]
    fn parity_of_quotes_with_ftfy() {
        for (text, recorded) in [
            ("it\u{2019}s \u{201c}HELLO\u{201d} and \u{2018}quoted\u{2019}", "it's \"HELLO\" and 'quoted'"),
            (
                "\u{201e}low\u{201c} \u{201a}low\u{2018} \u{201b}rev \u{201f}dbl \u{2bc}mod",
                "\"low\" 'low' 'rev \"dbl 'mod",
            ),
            ("\u{ab}guillemets\u{bb} \u{2033}prime\u{2033}", "\u{ab}guillemets\u{bb} \u{2033}prime\u{2033}"),
            ("a \"plain\" one's", "a \"plain\" one's"),
        ] {
            assert_eq!(uncurl(text), recorded);
        }
    }
}
