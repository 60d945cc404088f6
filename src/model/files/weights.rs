//! Named tensors in memory-mapped safetensors files.

use super::find;
use crate::error::{Error, Result};
use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorView};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The tensors of one safetensors file, or of the shards of a model that lies in several. Nothing is read before a
/// tensor is asked for; cloning shares the files.
#[derive(Debug, Clone)]
pub struct Weights {
    path: PathBuf,
    files: Vec<Arc<Mapped>>,
    entries: BTreeMap<String, Entry>,
}

/// A mapped file.
#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    bytes: Mmap,
    metadata: HashMap<String, String>,
}

/// Where a tensor lies.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes of the file, in this order: more than one where the file keeps the rows in another order.
    ranges: Vec<Range<usize>>,
}

impl Weights {
    /// Opens a safetensors file, or a folder with one or with the shards of one (diffusers' and transformers' names,
    /// full or `fp16`), and checks every header. Where a folder has several, the first whole one counts, full before
    /// `fp16`.
    ///
    /// # Errors
    /// There is nothing of this kind, a shard is missing or damaged, or there are only pickles; all say what to do.
    pub fn open(path: &Path) -> Result<Self> {
        let found = find::find(path)?;
        let mut weights = Self { path: found.path.clone(), files: Vec::new(), entries: BTreeMap::new() };
        for file in &found.files {
            let index = weights.files.len();
            let (mapped, metadata, start) = map(file)?;
            for (name, info) in metadata.tensors() {
                // Where there is an index, it says which file holds a tensor.
                if found.places.as_ref().is_some_and(|places| places.get(&name) != Some(&index)) {
                    continue;
                }
                let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
                let entry = Entry { file: index, dtype: info.dtype, shape: info.shape.clone(), ranges: vec![bytes] };
                weights.entries.insert(name, entry);
            }
            weights.files.push(Arc::new(mapped));
        }
        let absent = found.places.iter().flat_map(HashMap::keys).find(|name| !weights.entries.contains_key(*name));
        match absent {
            Some(name) => {
                let message = format!("names {name}, which the file it names for it lacks; download the folder again");
                Err(Error::File { path: found.path, message })
            }
            None => Ok(weights),
        }
    }

    /// The file, or the index of the files.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// The type of a tensor as it is stored; none if this program cannot read that type.
    pub fn dtype(&self, name: &str) -> Option<DType> {
        self.entries.get(name).and_then(|entry| entry.dtype.try_into().ok())
    }

    /// Number of elements of all tensors.
    pub fn elements(&self) -> usize {
        self.entries.values().map(|entry| entry.shape.iter().product::<usize>()).sum()
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.entries.values().flat_map(|entry| &entry.ranges).map(Range::len).sum()
    }

    /// The files' own words on `key`, in the `__metadata__` of their headers.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.files.iter().find_map(|file| file.metadata.get(key)).map(String::as_str)
    }

    /// Reads a tensor and converts it: f16, bf16, f32 and f64 (and f8 E4M3) to each other.
    ///
    /// # Errors
    /// There is no tensor of this name, or it cannot be converted.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let Some(entry) = self.entries.get(name) else { return Err(self.error(format!("lacks {name}"))) };
        let file = &self.files[entry.file];
        let data = match entry.ranges.as_slice() {
            [range] => Cow::Borrowed(&file.bytes[range.clone()]),
            ranges => Cow::Owned(ranges.iter().flat_map(|range| &file.bytes[range.clone()]).copied().collect()),
        };
        let tensor = TensorView::new(entry.dtype, entry.shape.clone(), &data)
            .map_err(candle_core::Error::from)
            .and_then(|view| view.load(device)?.to_dtype(dtype));
        tensor.map_err(|e| self.error(format!("{name} of type {:?} cannot be read: {e}", entry.dtype)))
    }

    /// Compares with what a model expects, (name, shape) each. A tensor that the model does not know is an error too,
    /// unless `ignored` says so of its name.
    ///
    /// # Errors
    /// All that is missing, too much or of another shape, the first twenty by name.
    pub fn check<'a>(
        &self,
        expected: impl IntoIterator<Item = (&'a str, &'a [usize])>,
        ignored: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let expected: BTreeMap<_, _> = expected.into_iter().collect();
        let mut problems = Vec::new();
        for (name, shape) in &expected {
            match self.shape(name) {
                None => problems.push(format!("{name} {shape:?} is missing")),
                Some(found) if found != *shape => problems.push(format!("{name} is {found:?}, not {shape:?}")),
                Some(_) => {}
            }
        }
        let extra = self.names().filter(|name| !expected.contains_key(name) && !ignored(name));
        problems.extend(extra.map(|name| format!("{name} is not of this model")));
        match problems.len() {
            0 => Ok(()),
            count => {
                const SHOWN: usize = 20;
                let more = if count > SHOWN { format!("; and {} more", count - SHOWN) } else { String::new() };
                problems.truncate(SHOWN);
                let list = problems.join("; ");
                let what = format!("does not fit the model; {count} tensors differ");
                Err(self.error(format!("{what}: {list}{more}. Is it of another model?")))
            }
        }
    }

    /// The tensors whose names begin with `prefix`, without it.
    pub fn under(&self, prefix: &str) -> Self {
        let entries = self.entries.iter();
        let entries = entries.filter_map(|(name, entry)| Some((name.strip_prefix(prefix)?.to_owned(), entry.clone())));
        Self { path: self.path.clone(), files: self.files.clone(), entries: entries.collect() }
    }

    /// An error about these files.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::File { path: self.path.clone(), message: message.into() }
    }
}

/// Maps a file and reads its header; with the place of its first tensor.
fn map(path: &Path) -> Result<(Mapped, Metadata, usize)> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the mapping is read-only. Who shortens a file of weights while a program reads it ends that program, as
    // with every reader that maps its files; nobody writes into them in place.
    let bytes = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
    let error = |message: String| Error::File { path: path.to_path_buf(), message };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(error("is a pointer of git-lfs, not the weights; fetch them with `git lfs pull`".into()));
    }
    let (header, metadata) = SafeTensors::read_metadata(&bytes)
        .map_err(|e| error(format!("is no whole safetensors file ({e}); download it again")))?;
    let own = metadata.metadata().clone().unwrap_or_default();
    Ok((Mapped { path: path.to_path_buf(), bytes, metadata: own }, metadata, header + size_of::<u64>()))
}
