//! Embeddings on disk: every prompt is encoded once, by one rank, and the encoders, 11 GB in bf16, need not stay in memory.
//!
//! One file a prompt (2.7 MB in bf16 with 256 T5 tokens): ranks and runs write without locks, a half-written file is
//! never seen under its name, and a damaged one costs one prompt. An entry is a safetensors file that any tool can
//! read; its metadata has the prompt and a digest of all it says.

use super::encoders::{Embeddings, Encoding, TextEncoders};
use crate::comm::Communicator;
use crate::error::{Error, Result};
use candle_core::safetensors::Load;
use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Beginning of the name of a file that is being written.
const WRITING: &str = ".writing-";
/// An unfinished file of this age was left by a run that was killed.
const LEFTOVER: Duration = Duration::from_secs(24 * 3600);

/// The embeddings of prompts by one [`Encoding`], in a folder that runs share.
#[derive(Debug)]
pub struct PromptCache {
    folder: PathBuf,
    encoding: Encoding,
    digest: String,
}

/// What [`PromptCache::fill`] did on this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filled {
    /// Prompts of this rank's share that were there.
    pub found: usize,
    /// Prompts of this rank's share that were encoded.
    pub encoded: usize,
}

impl PromptCache {
    /// The cache in the folder `root`, which is made if it is not there. Each encoding has a folder of its own in it.
    ///
    /// # Errors
    /// The encoders are not there, or the folder cannot be made.
    pub fn open(root: &Path, encoding: Encoding) -> Result<Self> {
        let digest = encoding.digest()?;
        let folder = root.join(&digest[..16]);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        Ok(Self { folder, encoding, digest })
    }

    /// Sees to it that every one of `prompts` is there: each rank checks its share, the prompts of the run dealt out in
    /// order, and encodes what is missing or damaged. The encoders are read if there is anything to encode, and freed at
    /// the end. Every rank calls this with the same prompts; those that finish early wait for the slowest.
    pub fn fill(&self, prompts: &[&str], comm: &dyn Communicator, device: &Device) -> Result<Filled> {
        if comm.rank() == 0 {
            self.sweep()?;
        }
        let unique: BTreeSet<&str> = prompts.iter().copied().collect();
        let share: Vec<&str> = unique.into_iter().skip(comm.rank()).step_by(comm.world_size()).collect();
        let mut missing = Vec::new();
        for &prompt in &share {
            match self.read(prompt)? {
                Entry::Whole(_) => {}
                Entry::Absent => missing.push(prompt),
                Entry::Damaged(why) => {
                    tracing::warn!("{}: {why}; it is encoded again", self.path(prompt).display());
                    missing.push(prompt);
                }
            }
        }
        if !missing.is_empty() {
            self.encode(&missing, device)?;
        }
        comm.barrier()?;
        Ok(Filled { found: share.len() - missing.len(), encoded: missing.len() })
    }

    /// The embeddings of `prompts`, in their order, on `device`.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are none; [`Error::File`] if an entry is absent, damaged or foreign: [`Self::fill`]
    /// was not called with this prompt, or the file has changed since.
    pub fn get(&self, prompts: &[&str], device: &Device) -> Result<Embeddings> {
        let entries = prompts.iter().map(|prompt| match self.read(prompt)? {
            Entry::Whole(embeddings) => Ok(embeddings),
            Entry::Absent => Err(self.unusable(prompt, "is not there")),
            Entry::Damaged(why) => Err(self.unusable(prompt, &why)),
        });
        let entries = entries.collect::<Result<Vec<_>>>()?;
        if entries.is_empty() {
            return Err(Error::Usage("no prompts were given".into()));
        }
        let stack = |part: fn(&Embeddings) -> &Tensor| -> Result<Tensor> {
            Ok(Tensor::cat(&entries.iter().map(part).collect::<Vec<_>>(), 0)?.to_device(device)?)
        };
        Ok(Embeddings { context: stack(|e| &e.context)?, pooled: stack(|e| &e.pooled)? })
    }

    fn encode(&self, prompts: &[&str], device: &Device) -> Result<()> {
        let encoders = TextEncoders::load(&self.encoding, device)?;
        let mut cut = 0;
        for prompt in prompts {
            cut += usize::from(encoders.cuts(prompt)?);
            // One at a time: a value does not depend on the prompts that are encoded with it.
            self.write(prompt, &encoders.encode(&[prompt])?)?;
        }
        if cut > 0 {
            let (all, tokens) = (prompts.len(), self.encoding.t5_tokens);
            tracing::warn!("{cut} of {all} prompts are longer than the encoders take ({tokens} T5 tokens): cut off");
        }
        Ok(())
    }

    fn path(&self, prompt: &str) -> PathBuf {
        self.folder.join(format!("{}.safetensors", blake3::hash(prompt.as_bytes()).to_hex()))
    }

    fn unusable(&self, prompt: &str, why: &str) -> Error {
        let message = format!("the embedding of {prompt:?} {why}; start again, missing ones are encoded at the start");
        Error::File { path: self.path(prompt), message }
    }

    fn read(&self, prompt: &str) -> Result<Entry> {
        let path = self.path(prompt);
        match fs::read(&path) {
            Ok(bytes) => Ok(self.parse(prompt, &bytes).map_or_else(Entry::Damaged, Entry::Whole)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Entry::Absent),
            Err(e) => Err(Error::io(path)(e)),
        }
    }

    /// The embedding in an entry, or what is wrong with it.
    fn parse(&self, prompt: &str, bytes: &[u8]) -> std::result::Result<Embeddings, String> {
        let damaged = |e: &dyn std::fmt::Display| format!("is damaged: {e}");
        let file = SafeTensors::deserialize(bytes).map_err(|e| damaged(&e))?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(&e))?;
        let metadata = header.metadata().as_ref();
        let says = |key: &str| metadata.and_then(|words| words.get(key)).map_or("", String::as_str);
        if says(ENCODING) != self.digest || says(PROMPT) != prompt {
            return Err("is of another prompt or of other encoders".into());
        }
        let part = |name: &str| {
            let view = file.tensor(name).map_err(|e| damaged(&e))?;
            view.load(&Device::Cpu).map_err(|e| damaged(&e))
        };
        let embeddings = Embeddings { context: part(CONTEXT)?, pooled: part(POOLED)? };
        if embeddings.context.dtype() != self.encoding.dtype || embeddings.context.rank() != 3 {
            return Err("is damaged: its tensors are of another kind".into());
        }
        match self.checksum(prompt, &embeddings) {
            Ok(sum) if sum == says(CHECKSUM) => Ok(embeddings),
            _ => Err("is damaged: its content does not have its digest".into()),
        }
    }

    fn write(&self, prompt: &str, embeddings: &Embeddings) -> Result<()> {
        let cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.contiguous();
        let embeddings = Embeddings { context: cpu(&embeddings.context)?, pooled: cpu(&embeddings.pooled)? };
        let words = [
            (ENCODING, self.digest.clone()),
            (PROMPT, prompt.to_owned()),
            (CHECKSUM, self.checksum(prompt, &embeddings)?),
        ];
        let words: HashMap<_, _> = words.map(|(key, value)| (key.to_owned(), value)).into();
        let tensors = [(CONTEXT, &embeddings.context), (POOLED, &embeddings.pooled)];
        let bytes = safetensors::serialize(tensors, Some(words)).map_err(candle_core::Error::from)?;
        let mut file = tempfile::Builder::new()
            .prefix(WRITING)
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(&self.folder)
            .map_err(Error::io(&self.folder))?;
        file.write_all(&bytes).map_err(Error::io(file.path()))?;
        let path = self.path(prompt);
        file.persist(&path).map_err(|e| Error::io(path)(e.error)).map(drop)
    }

    /// Digest of all that an entry says.
    fn checksum(&self, prompt: &str, Embeddings { context, pooled }: &Embeddings) -> Result<String> {
        let mut hash = blake3::Hasher::new();
        hash.update(format!("{}\n{prompt:?}\n", self.digest).as_bytes());
        for tensor in [context, pooled] {
            hash.update(format!("{:?} {:?}\n", tensor.dtype(), tensor.dims()).as_bytes());
            hash.update(&safetensors::View::data(tensor));
        }
        Ok(hash.finalize().to_hex().to_string())
    }

    /// Removes what killed runs left unfinished.
    fn sweep(&self) -> Result<()> {
        for entry in fs::read_dir(&self.folder).map_err(Error::io(&self.folder))?.flatten() {
            let age = entry.metadata().and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
            if entry.file_name().to_string_lossy().starts_with(WRITING) && age.is_some_and(|age| age > LEFTOVER) {
                // Another run may be sweeping as well.
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }
}

/// What is found under a prompt's name.
enum Entry {
    Whole(Embeddings),
    Absent,
    Damaged(String),
}

const CONTEXT: &str = "context";
const POOLED: &str = "pooled";
const ENCODING: &str = "encoding";
const PROMPT: &str = "prompt";
const CHECKSUM: &str = "blake3";
