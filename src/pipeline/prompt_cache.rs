//! Embeddings on disk: every prompt is encoded once, by one rank, and the encoders, 11 GB in bf16, need not stay in memory.
//!
//! One file a prompt (2.7 MB in bf16 with 256 T5 tokens): ranks and runs write without locks, a half-written file is
//! never seen under its name, and a damaged one costs one prompt. An entry is a safetensors file that any tool can
//! read; its metadata has the prompt and a digest of all it says.
//!
//! Entries are mapped, and only for as long as they are looked at: of 25 000 prompts none stays in memory, and what the
//! kernel keeps of the files all ranks of a host share.

use crate::comm::{Communicator, exchange};
use crate::error::{Error, Result};
use crate::model::text::{Embeddings, Encoding, TextEncoders};
use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::tensor::{SafeTensorError, SafeTensors, TensorView, View};
use std::collections::hash_map::Entry::{Occupied, Vacant};
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
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
    /// The entries whose content had its digest, by path.
    verified: Mutex<HashMap<PathBuf, Version>>,
}

/// What of a file changes with its content: inode, length, and time of the last change in nanoseconds.
type Version = (u64, u64, i128);

/// What [`PromptCache::fill`] did on this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filled {
    /// Prompts that were there, of those that this rank looked for.
    pub found: usize,
    /// Prompts that this rank encoded.
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
        Ok(Self { folder, encoding, digest, verified: Mutex::default() })
    }

    /// Sees to it that every one of `prompts` is there: each rank checks its share, the prompts of the run dealt out in
    /// order, and what is missing or damaged is dealt out anew, so that none encodes more than one prompt more than another,
    /// however the cache was filled before. The encoders are read if there is anything to encode, and freed at the end.
    /// Every rank calls this with the same prompts; those that finish early wait for the slowest.
    ///
    /// # Errors
    /// [`Error::Usage`], the same on every rank, where the ranks have different encoders.
    pub fn fill(&self, prompts: &[&str], comm: &dyn Communicator, device: &Device) -> Result<Filled> {
        if comm.rank() == 0 {
            self.sweep()?;
        }
        let unique: BTreeSet<&str> = prompts.iter().copied().collect();
        let unique: Vec<&str> = unique.into_iter().collect();
        let (mut found, mut missing) = (0, Vec::new()); // places in `unique`
        for (place, prompt) in dealt(unique.iter().enumerate(), comm) {
            match self.look(prompt, |_| Ok(()))? {
                Entry::Whole(()) => found += 1,
                Entry::Absent => missing.push(place),
                Entry::Damaged(why) => {
                    tracing::warn!("{}: {why}; it is encoded again", self.path(prompt).display());
                    missing.push(place);
                }
            }
        }
        let all = exchange(comm, &(self.digest.clone(), missing))?;
        if let Some(rank) = all.iter().position(|(digest, _)| *digest != all[0].0) {
            return Err(Error::Usage(format!(
                "rank {rank} has other text encoders in {} than rank 0: give all hosts the same files, or a folder that they \
                 share",
                self.encoding.folder.display()
            )));
        }
        let missing = all.into_iter().flat_map(|(_, missing)| missing);
        let mine: Vec<&str> = dealt(missing, comm).map(|place| unique[place]).collect();
        if !mine.is_empty() {
            self.encode(&mine, comm.world_size(), device)?;
        }
        comm.barrier()?;
        Ok(Filled { found, encoded: mine.len() })
    }

    /// The embeddings of `prompts`, in their order, on `device`. An entry is checked in full when it is used for the first
    /// time or has changed.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are none; [`Error::File`] if an entry is absent, damaged or foreign: [`Self::fill`]
    /// was not called with this prompt, or the file has changed since.
    pub fn get(&self, prompts: &[&str], device: &Device) -> Result<Embeddings> {
        let load = |tensors: &[TensorView; 2]| -> Result<[Tensor; 2]> {
            Ok([tensors[0].load(&Device::Cpu)?, tensors[1].load(&Device::Cpu)?])
        };
        let mut read = HashMap::new(); // images of one prompt come together
        for &prompt in prompts {
            if let Vacant(place) = read.entry(prompt) {
                match self.look(prompt, load)? {
                    Entry::Whole(tensors) => place.insert(tensors),
                    Entry::Absent => return Err(self.unusable(prompt, "is not there")),
                    Entry::Damaged(why) => return Err(self.unusable(prompt, &why)),
                };
            }
        }
        if read.is_empty() {
            return Err(Error::Usage("no prompts were given".into()));
        }
        let stack = |part: usize| -> Result<Tensor> {
            let rows: Vec<&Tensor> = prompts.iter().map(|prompt| &read[prompt][part]).collect();
            Ok(Tensor::cat(&rows, 0)?.to_device(device)?)
        };
        Ok(Embeddings { context: stack(0)?, pooled: stack(1)? })
    }

    /// Encodes `prompts`, which are one rank's of `ranks`.
    fn encode(&self, prompts: &[&str], ranks: usize, device: &Device) -> Result<()> {
        let encoders = TextEncoders::load(&self.encoding, device)?;
        let mut cut = 0;
        for (done, prompt) in prompts.iter().enumerate() {
            cut += usize::from(encoders.cuts(prompt)?);
            // One at a time: a value does not depend on the prompts that are encoded with it.
            self.write(prompt, &encoders.encode(&[prompt])?)?;
            if done == 0 {
                let entry = fs::metadata(self.path(prompt)).map_err(Error::io(&self.folder))?.len();
                let left = entry * ((prompts.len() - 1) * ranks) as u64;
                // Where the system does not say how much is free, writing will.
                let free = rustix::fs::statvfs(&self.folder).map_or(u64::MAX, |found| found.f_bavail * found.f_frsize);
                check_room(&self.folder, free, left)?;
            }
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

    /// What `take` makes of a prompt's tensors, context and pooled, in the mapped file.
    fn look<T>(&self, prompt: &str, take: impl FnOnce(&[TensorView; 2]) -> Result<T>) -> Result<Entry<T>> {
        let path = self.path(prompt);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Entry::Absent),
            Err(e) => return Err(Error::io(path)(e)),
        };
        let data = file.metadata().map_err(Error::io(&path))?;
        let version =
            (data.ino(), data.len(), i128::from(data.mtime()) * 1_000_000_000 + i128::from(data.mtime_nsec()));
        // SAFETY: the mapping is read-only, and the files of this folder are never written in place: a new one takes the
        // name, and the one that is mapped stays what it was.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
        let (tensors, sum) = match self.parse(prompt, &map) {
            Ok(parsed) => parsed,
            Err(why) => return Ok(Entry::Damaged(why)),
        };
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        let known = verified.entry(path);
        if !matches!(&known, Occupied(known) if *known.get() == version) {
            if self.checksum(prompt, &tensors).ok().as_ref() != Some(&sum) {
                return Ok(Entry::Damaged("is damaged: its content does not have its digest".into()));
            }
            known.insert_entry(version);
        }
        drop(verified);
        take(&tensors).map(Entry::Whole)
    }

    /// The tensors of an entry, context and pooled, and the digest that it names; or what is wrong with it.
    fn parse<'a>(&self, prompt: &str, bytes: &'a [u8]) -> std::result::Result<([TensorView<'a>; 2], String), String> {
        let damaged = |e: SafeTensorError| format!("is damaged: {e}");
        let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let metadata = header.metadata().as_ref();
        let says = |key: &str| metadata.and_then(|words| words.get(key)).map_or("", String::as_str);
        if says(ENCODING) != self.digest || says(PROMPT) != prompt {
            return Err("is of another prompt or of other encoders".into());
        }
        let tensors = [file.tensor(CONTEXT).map_err(damaged)?, file.tensor(POOLED).map_err(damaged)?];
        let dtype = DType::try_from(tensors[0].dtype()).ok();
        if dtype != Some(self.encoding.dtype) || tensors[0].shape().len() != 3 {
            return Err("is damaged: its tensors are of another kind".into());
        }
        Ok((tensors, says(CHECKSUM).to_owned()))
    }

    fn write(&self, prompt: &str, embeddings: &Embeddings) -> Result<()> {
        let cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.contiguous();
        let tensors = [cpu(&embeddings.context)?, cpu(&embeddings.pooled)?];
        let words = [
            (ENCODING, self.digest.clone()),
            (PROMPT, prompt.to_owned()),
            (CHECKSUM, self.checksum(prompt, &tensors)?),
        ];
        let words: HashMap<_, _> = words.map(|(key, value)| (key.to_owned(), value)).into();
        let bytes = safetensors::serialize([CONTEXT, POOLED].into_iter().zip(&tensors), Some(words))
            .map_err(candle_core::Error::from)?;
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
    fn checksum(&self, prompt: &str, tensors: &[impl View; 2]) -> Result<String> {
        let mut hash = blake3::Hasher::new();
        hash.update(format!("{}\n{prompt:?}\n", self.digest).as_bytes());
        for tensor in tensors {
            let dtype = DType::try_from(tensor.dtype())?;
            hash.update(format!("{dtype:?} {:?}\n", tensor.shape()).as_bytes());
            hash.update(&tensor.data());
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

/// Refuses to begin what the disk has no room for, `needed` bytes: it would end hours later.
fn check_room(folder: &Path, free: u64, needed: u64) -> Result<()> {
    if free >= needed {
        return Ok(());
    }
    let [free, needed] = [free, needed].map(|bytes| bytes as f64 / 1e9);
    let message = format!(
        "{free:.1} GB are free, and the prompts that are still to be encoded need about {needed:.1} GB; make room, or set \
         model.prompt_cache to a folder on another disk"
    );
    Err(Error::File { path: folder.to_path_buf(), message })
}

/// This rank's share of what is dealt out to all.
fn dealt<T>(all: impl Iterator<Item = T>, comm: &dyn Communicator) -> impl Iterator<Item = T> {
    all.skip(comm.rank()).step_by(comm.world_size())
}

/// What is found under a prompt's name.
enum Entry<T> {
    Whole(T),
    Absent,
    Damaged(String),
}

const CONTEXT: &str = "context";
const POOLED: &str = "pooled";
const ENCODING: &str = "encoding";
const PROMPT: &str = "prompt";
const CHECKSUM: &str = "blake3";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_room_is_told() {
        assert!(check_room(Path::new("cache"), 2_700_000, 2_700_000).is_ok());
        let error = check_room(Path::new("cache"), 1_500_000_000, 67_500_000_000).unwrap_err();
        let message =
            "cache: 1.5 GB are free, and the prompts that are still to be encoded need about 67.5 GB; make room";
        assert!(error.exit_code() == 2 && error.to_string().starts_with(message), "{error}");
    }
}
