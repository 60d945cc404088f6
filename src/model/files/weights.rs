//! Named tensors in memory-mapped safetensors files.

use super::find;
use crate::error::{Error, Result};
use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::{Deref, Range};
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

/// One file.
#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    bytes: Bytes,
    metadata: HashMap<String, String>,
}

/// The bytes of a file, or of the program itself.
#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
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

/// How the rows of a renamed tensor lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// As before.
    Same,
    /// The second half first.
    HalvesSwapped,
    /// As before; of a 1 x 1 convolution, `[out, in, 1, 1]`, as a matrix.
    Matrix,
}

impl Entry {
    /// Equal parts of the rows; none if they cannot be divided.
    fn parts(&self, count: usize) -> Option<Vec<Self>> {
        let [range] = self.ranges.as_slice() else { return None };
        if count == 1 {
            return Some(vec![self.clone()]);
        }
        let rows = *self.shape.first()?;
        if !rows.is_multiple_of(count) || !range.len().is_multiple_of(count) {
            return None;
        }
        let (mut shape, length) = (self.shape.clone(), range.len() / count);
        shape[0] = rows / count;
        let part = |i: usize| {
            let bytes = range.start + i * length..range.start + (i + 1) * length;
            Self { shape: shape.clone(), ranges: vec![bytes], ..self.clone() }
        };
        Some((0..count).map(part).collect())
    }
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
        for path in &found.files {
            let file = crate::files::open(path)?;
            // SAFETY: the mapping is read-only. Who shortens a file of weights while a program reads it ends that
            // program, as with every reader that maps its files; nobody writes into them in place.
            let bytes = Bytes::Mapped(unsafe { Mmap::map(&file) }.map_err(Error::io(path))?);
            // Where there is an index, it says which file holds a tensor.
            let index = weights.files.len();
            weights.push(path, bytes, |name| found.places.as_ref().is_none_or(|of| of.get(name) == Some(&index)))?;
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

    /// The tensors of a safetensors file that is part of the program; `path` is what errors call it.
    pub fn embedded(path: &Path, bytes: &'static [u8]) -> Result<Self> {
        let mut weights = Self { path: path.to_path_buf(), files: Vec::new(), entries: BTreeMap::new() };
        weights.push(path, Bytes::Embedded(bytes), |_| true)?;
        Ok(weights)
    }

    /// Adds a file with those of its tensors that are `wanted`.
    fn push(&mut self, path: &Path, bytes: Bytes, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let error = |message: String| Error::File { path: path.to_path_buf(), message };
        if bytes.starts_with(b"version https://git-lfs") {
            return Err(error("is a pointer of git-lfs, not the weights; fetch them with `git lfs pull`".into()));
        }
        let (header, metadata) = SafeTensors::read_metadata(&bytes)
            .map_err(|e| error(format!("is no whole safetensors file ({e}); download it again")))?;
        let (file, start) = (self.files.len(), header + size_of::<u64>());
        for (name, info) in metadata.tensors().into_iter().filter(|(name, _)| wanted(name)) {
            let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
            let entry = Entry { file, dtype: info.dtype, shape: info.shape.clone(), ranges: vec![bytes] };
            self.entries.insert(name, entry);
        }
        let metadata = metadata.metadata().clone().unwrap_or_default();
        self.files.push(Arc::new(Mapped { path: path.to_path_buf(), bytes, metadata }));
        Ok(())
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
        let shape = self.entry(name)?.shape.as_slice();
        Ok(self.part(name, 0..shape.iter().product(), dtype, device)?.reshape(shape)?)
    }

    /// Reads elements `range` of a tensor, as they lie in it row by row, and converts them: `[range.len()]`. The rest of
    /// the file is not touched.
    ///
    /// # Errors
    /// There is no tensor of this name, it ends before the range, or it cannot be converted.
    pub fn part(&self, name: &str, range: Range<usize>, dtype: DType, device: &Device) -> Result<Tensor> {
        let entry = self.entry(name)?;
        let (size, len) = (entry.dtype.bitsize() / 8, range.len());
        let data = match self.bytes_of(entry, range.start * size..range.end * size).collect::<Vec<_>>().as_slice() {
            [one] => Cow::Borrowed(*one),
            several => Cow::Owned(several.concat()),
        };
        let tensor = TensorView::new(entry.dtype, vec![len], &data)
            .map_err(candle_core::Error::from)
            .and_then(|view| view.load(device)?.to_dtype(dtype));
        tensor.map_err(|e| self.error(format!("{name} of type {:?} cannot be read: {e}", entry.dtype)))
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| self.error(format!("lacks {name}")))
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

    /// The same tensors under other names: `rename` gives one name and [`Rows::Same`] or [`Rows::HalvesSwapped`], or the
    /// names of the equal parts, top to bottom, into which the rows are divided. What it gives no name for is left out.
    ///
    /// # Errors
    /// The rows cannot be divided so.
    pub(super) fn renamed(&self, rename: impl Fn(&str) -> Option<(Vec<String>, Rows)>) -> Result<Self> {
        let mut entries = BTreeMap::new();
        for (name, entry) in &self.entries {
            let Some((names, rows)) = rename(name) else { continue };
            let parts = match rows {
                Rows::Same => entry.parts(names.len()),
                Rows::HalvesSwapped => entry.parts(2).map(|mut halves| {
                    halves.reverse();
                    let ranges = halves.into_iter().flat_map(|half| half.ranges).collect();
                    vec![Entry { ranges, ..entry.clone() }]
                }),
                Rows::Matrix => {
                    let mut shape = entry.shape.clone();
                    if let [_, _, 1, 1] = shape[..] {
                        shape.truncate(2);
                    }
                    Some(vec![Entry { shape, ..entry.clone() }])
                }
            };
            let Some(parts) = parts else {
                let shape = &entry.shape;
                return Err(self.error(format!("{name} {shape:?} cannot be divided; is it of another model?")));
            };
            entries.extend(names.into_iter().zip(parts));
        }
        Ok(Self { path: self.path.clone(), files: self.files.clone(), entries })
    }

    /// A digest of the tensors, for telling base models apart. Of one file below 1 GiB: of all its bytes. Of larger ones
    /// and of shards: of names, types and shapes, and of a page of 4 KiB at the start, the middle and the end of every
    /// tensor, so that a model of several gigabytes need not be read; the same in every layout.
    pub fn digest(&self) -> String {
        if let [file] = self.files.as_slice()
            && file.bytes.len() < 1 << 30
        {
            return blake3::hash(&file.bytes).to_hex().to_string();
        }
        const PAGE: usize = 4096;
        let mut hasher = blake3::Hasher::new();
        for (name, entry) in &self.entries {
            hasher.update(format!("{name} {:?} {:?}\n", entry.dtype, entry.shape).as_bytes());
            let length: usize = entry.ranges.iter().map(Range::len).sum();
            for start in [0, length / 2, length.saturating_sub(PAGE)] {
                self.bytes_of(entry, start..start + PAGE).for_each(|bytes| _ = hasher.update(bytes));
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The bytes `wanted` of a tensor, as far as it has them, in pieces.
    fn bytes_of(&self, entry: &Entry, wanted: Range<usize>) -> impl Iterator<Item = &[u8]> {
        let file = &self.files[entry.file];
        let mut place = 0;
        entry.ranges.iter().filter_map(move |range| {
            let inside = |at: usize| range.start + at.clamp(place, place + range.len()) - place;
            let bytes = &file.bytes[inside(wanted.start)..inside(wanted.end)];
            place += range.len();
            (!bytes.is_empty()).then_some(bytes)
        })
    }

    /// An error about these files.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::File { path: self.path.clone(), message: message.into() }
    }
}
