//! The three encoders together.

use super::{T5Encoder, Tokenizer};
use crate::error::{Error, Result};
use crate::fs;
use crate::model::clip;
use crate::model::files::{Weights, has_t5};
use crate::model::mmdit;
use candle_core::{DType, Device, Tensor};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Tokens of a text for CLIP.
const CLIP_TOKENS: usize = 77;
/// The most tokens of a text for T5 that Stable Diffusion 3.5 is used with.
pub const MOST_T5_TOKENS: usize = 512;

/// What the transformer is conditioned on.
#[derive(Debug, Clone)]
pub struct Embeddings {
    /// The texts' tokens `[B, L, D]`, CLIP's first.
    pub context: Tensor,
    /// The texts as a whole, `[B, P]`.
    pub pooled: Tensor,
}

impl Embeddings {
    /// Joins what CLIP-L and CLIP-G, each as (penultimate states `[B, 77, D_i]`, features `[B, P_i]`), and T5,
    /// `[B, T, D]`, make of the same texts: CLIP's states side by side, zeros up to T5's width, T5's states behind them;
    /// the features side by side.
    ///
    /// # Errors
    /// CLIP's states are wider than T5's, or numbers of texts differ.
    pub fn join(clip: [(&Tensor, &Tensor); 2], t5: &Tensor) -> Result<Self> {
        let [(states_l, features_l), (states_g, features_g)] = clip;
        let states = Tensor::cat(&[states_l, states_g], 2)?;
        let (narrow, wide) = (states.dim(2)?, t5.dim(2)?);
        if narrow > wide {
            return Err(Error::Usage(format!(
                "CLIP's states are {narrow} wide together, T5's {wide}; the encoders do not belong together"
            )));
        }
        let states = states.pad_with_zeros(2, 0, wide - narrow)?;
        Ok(Self { context: Tensor::cat(&[&states, t5], 1)?, pooled: Tensor::cat(&[features_l, features_g], 1)? })
    }

    /// Refuses values that are not finite: pictures of them would be black, and a cache would keep them.
    ///
    /// # Errors
    /// [`Error::NotFinite`] that names the first of the `texts` with one.
    fn check(&self, texts: &[&str]) -> Result<()> {
        for (row, text) in texts.iter().enumerate() {
            for part in [&self.context, &self.pooled] {
                let values = part.get(row)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                    return Err(Error::NotFinite(format!(
                        "the text encoders make {value} of {text:?}: their weights or config.json are damaged, or they \
                         overflow; download them again"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Which encoders, and how they are used: all that an embedding depends on besides its prompt.
#[derive(Debug, Clone)]
pub struct Encoding {
    /// The folder of a diffusers pipeline: text_encoder, tokenizer, text_encoder_2, tokenizer_2 (CLIP-L, CLIP-G),
    /// text_encoder_3 and tokenizer_3 (T5; see [`has_t5`]).
    pub folder: PathBuf,
    /// Tokens of a text for T5.
    pub t5_tokens: usize,
    /// The type that the encoders compute in, and that embeddings have: f32 or bf16.
    pub dtype: DType,
}

impl Encoding {
    fn part(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        if path.is_dir() {
            return Ok(path);
        }
        let message = format!(
            "has no folder {name}; give the folder of a whole Stable Diffusion 3.5 pipeline as diffusers writes it, the \
             one with model_index.json"
        );
        Err(Error::File { path: self.folder.clone(), message })
    }

    /// Whether this can be done at all.
    ///
    /// # Errors
    /// [`Error::Usage`]: the number of tokens or the type is not supported.
    pub fn check(&self) -> Result<()> {
        if !(1..=MOST_T5_TOKENS).contains(&self.t5_tokens) {
            let tokens = self.t5_tokens;
            return Err(Error::Usage(format!("{tokens} T5 tokens are not supported; take 1 to {MOST_T5_TOKENS}")));
        }
        if ![DType::F32, DType::BF16].contains(&self.dtype) {
            let dtype = self.dtype;
            return Err(Error::Usage(format!("the text encoders do not compute in {dtype:?}; take F32 or BF16")));
        }
        Ok(())
    }

    /// Digest of all that an embedding depends on besides its prompt: tokenizers, configurations, weights, number of
    /// tokens, type. A file of up to 1 GiB counts with all its content; a longer one with its length and its first and
    /// last MiB, so that 10 GB need not be read.
    pub fn digest(&self) -> Result<String> {
        self.check()?;
        let mut hash = blake3::Hasher::new();
        hash.update(format!("encoding 1\n{} {:?}\n", self.t5_tokens, self.dtype).as_bytes());
        for number in ["", "_2", "_3"] {
            if number == "_3" && !has_t5(&self.folder)? {
                hash.update(format!("no T5, width {}\n", self.transformer()?.joint_attention_dim).as_bytes());
                continue;
            }
            let tokenizer = self.part(&format!("tokenizer{number}"))?;
            let encoder = self.part(&format!("text_encoder{number}"))?;
            for path in files(&tokenizer)? {
                hash_file(&mut hash, &path)?;
            }
            hash_file(&mut hash, &encoder.join("config.json"))?;
            for path in Weights::open(&encoder)?.files() {
                hash_file(&mut hash, path)?;
            }
        }
        Ok(hash.finalize().to_hex().to_string())
    }

    /// The transformer's sizes: they say how wide T5's part is when there is no T5.
    fn transformer(&self) -> Result<mmdit::Config> {
        mmdit::Config::read(&self.part("transformer")?.join("config.json"))
    }
}

/// The regular files of a folder, sorted.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let paths = entries.map(|entry| Ok(entry.map_err(Error::io(folder))?.path())).collect::<Result<Vec<_>>>()?;
    let mut files: Vec<_> = paths.into_iter().filter(|path| path.is_file()).collect();
    files.sort_unstable();
    Ok(files)
}

fn hash_file(hash: &mut blake3::Hasher, path: &Path) -> Result<()> {
    const WHOLE: u64 = 1 << 30;
    const PART: u64 = 1 << 20;
    let error = || Error::io(path);
    let mut file = fs::open(path)?;
    let length = file.metadata().map_err(error())?.len();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    hash.update(format!("{name} {length}\n").as_bytes());
    if length <= WHOLE {
        hash.update_reader(file).map_err(error())?;
    } else {
        hash.update_reader((&mut file).take(PART)).map_err(error())?;
        file.seek(SeekFrom::End(-(PART as i64))).map_err(error())?;
        hash.update_reader(file).map_err(error())?;
    }
    Ok(())
}

/// T5 and its tokenizer, or the zeros that stand for it: diffusers takes as many as CLIP has tokens.
#[derive(Debug)]
enum Third {
    T5(Box<(Tokenizer, T5Encoder)>),
    Zeros { tokens: usize, width: usize },
}

/// The encoders of a pipeline.
#[derive(Debug)]
pub struct TextEncoders {
    clip: [(Tokenizer, clip::TextEncoder); 2],
    third: Third,
    dtype: DType,
    device: Device,
}

impl TextEncoders {
    /// Reads the encoders of an [`Encoding`].
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Usage`]: something is missing, of another model, or not supported.
    pub fn load(encoding: &Encoding, device: &Device) -> Result<Self> {
        encoding.check()?;
        let dtype = encoding.dtype;
        let clip = |number: &str| -> Result<_> {
            let folder = encoding.part(&format!("text_encoder{number}"))?;
            let encoder = clip::TextEncoder::load(&folder, dtype, device)?;
            let tokenizer = Tokenizer::open(&encoding.part(&format!("tokenizer{number}"))?, CLIP_TOKENS)?;
            tokenizer.check(clip::TextConfig::read(&folder)?.vocab_size)?;
            Ok((tokenizer, encoder))
        };
        let third = if has_t5(&encoding.folder)? {
            let tokenizer = Tokenizer::open(&encoding.part("tokenizer_3")?, encoding.t5_tokens)?;
            let folder = encoding.part("text_encoder_3")?;
            tokenizer.check(T5Encoder::vocabulary(&folder)?)?;
            Third::T5(Box::new((tokenizer, T5Encoder::load(&folder, dtype, device)?)))
        } else {
            let folder = encoding.folder.display();
            tracing::warn!("{folder}: has no text_encoder_3, or its list names none: zeros stand for T5");
            Third::Zeros { tokens: CLIP_TOKENS, width: encoding.transformer()?.joint_attention_dim }
        };
        Ok(Self { clip: [clip("")?, clip("_2")?], third, dtype, device: device.clone() })
    }

    /// Whether a text is longer than any of the encoders takes: then its end is in no embedding.
    pub fn cuts(&self, text: &str) -> Result<bool> {
        let longest = match &self.third {
            Third::T5(t5) => &t5.0,
            Third::Zeros { .. } => &self.clip[0].0,
        };
        longest.cuts(text)
    }

    /// The embeddings of texts, in the order given.
    pub fn encode(&self, texts: &[&str]) -> Result<Embeddings> {
        let tokens =
            |tokenizer: &Tokenizer| texts.iter().map(|text| tokenizer.encode(text)).collect::<Result<Vec<_>>>();
        let run = |(tokenizer, encoder): &(Tokenizer, clip::TextEncoder)| encoder.forward(&tokens(tokenizer)?);
        let (l, g) = (run(&self.clip[0])?, run(&self.clip[1])?);
        let t5 = match &self.third {
            Third::T5(t5) => t5.1.forward(&tokens(&t5.0)?)?.last,
            Third::Zeros { tokens, width } => Tensor::zeros((texts.len(), *tokens, *width), self.dtype, &self.device)?,
        };
        let embeddings = Embeddings::join([(l.penultimate(), &l.features), (g.penultimate(), &g.features)], &t5)?;
        embeddings.check(texts)?;
        Ok(embeddings)
    }
}
