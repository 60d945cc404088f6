//! Named tensors in memory-mapped safetensors files.

use super::find;
use super::finite::{first_not_finite, not_finite};
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
    pub(super) path: PathBuf,
    pub(super) files: Vec<Arc<Mapped>>,
    pub(super) entries: BTreeMap<String, Entry>,
    /// Weights in the same folder that do not count.
    pub(super) beside: Vec<PathBuf>,
}

/// One file.
#[derive(Debug)]
pub(super) struct Mapped {
    path: PathBuf,
    pub(super) bytes: Bytes,
    metadata: HashMap<String, String>,
}

/// The bytes of a file, or of the program itself.
#[derive(Debug)]
pub(super) enum Bytes {
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
    /// What it is called there.
    name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Bytes of the file, in this order: more than one where the file keeps the rows in another order.
    pub(super) ranges: Vec<Range<usize>>,
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
    /// All of them under each of the names.
    Shared,
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
    /// full or `fp16`), and checks every header. Where a folder has several, full precision counts before `fp16`, and
    /// shards before a single file or after it as the library of these names has it; see [`Weights::passed_over`].
    ///
    /// # Errors
    /// There is nothing of this kind, a shard is missing or damaged, or there are only pickles; all say what to do.
    pub fn open(path: &Path) -> Result<Self> {
        let found = find::find(path)?;
        let mut weights = Self { beside: found.beside, ..Self::empty(&found.path) };
        for path in &found.files {
            let file = crate::fs::open(path)?;
            // SAFETY: the mapping is read-only. Who shortens a file of weights while a program reads it ends that
            // program, as with every reader that maps its files; nobody writes into them in place.
            let bytes = Bytes::Mapped(unsafe { Mmap::map(&file) }.map_err(Error::io(path))?);
            // Where there is an index, it says which file holds a tensor; one that it does not name counts as in a single file.
            let (index, places) = (weights.files.len(), found.places.as_ref());
            weights.push(path, bytes, |name| places.and_then(|of| of.get(name)).is_none_or(|place| *place == index))?;
        }
        let absent = found.places.iter().flat_map(HashMap::keys).find(|name| !weights.entries.contains_key(*name));
        match absent {
            Some(name) => {
                let message = format!("names {name}, which the file it names for it lacks; download the folder again");
                Err(Error::File { path: found.path, message })
            }
            None => {
                weights.tell_passed_over();
                Ok(weights)
            }
        }
    }

    /// The tensors of a safetensors file that is part of the program; `path` is what errors call it.
    pub fn embedded(path: &Path, bytes: &'static [u8]) -> Result<Self> {
        let mut weights = Self::empty(path);
        weights.push(path, Bytes::Embedded(bytes), |_| true)?;
        Ok(weights)
    }

    fn empty(path: &Path) -> Self {
        Self { path: path.to_path_buf(), files: Vec::new(), entries: BTreeMap::new(), beside: Vec::new() }
    }

    /// The same files with other names for their tensors.
    fn with(&self, entries: BTreeMap<String, Entry>) -> Self {
        Self { path: self.path.clone(), files: self.files.clone(), entries, beside: self.beside.clone() }
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
            let (dtype, shape, ranges) = (info.dtype, info.shape.clone(), vec![bytes]);
            self.entries.insert(name.clone(), Entry { file, name, dtype, shape, ranges });
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

    /// The name of a tensor's type as it is stored, which need not be one that can be read: `f32`, `f8_e5m2`.
    pub fn stored_type(&self, name: &str) -> Option<String> {
        let entry = self.entries.get(name)?;
        let readable = DType::try_from(entry.dtype).map(|dtype| dtype.as_str().to_owned());
        Some(readable.unwrap_or_else(|_| format!("{:?}", entry.dtype).to_lowercase()))
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
    /// As [`Weights::part`].
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let shape = self.entry(name)?.shape.as_slice();
        Ok(self.part(name, 0..shape.iter().product(), dtype, device)?.reshape(shape)?)
    }

    /// Reads elements `range` of a tensor, as they lie in it row by row, and converts them: `[range.len()]`. The rest of
    /// the file is not touched.
    ///
    /// # Errors
    /// There is no tensor of this name, it ends before the range, it is of a type that is no weight's, or one of the
    /// elements is NaN or infinite.
    pub fn part(&self, name: &str, range: Range<usize>, dtype: DType, device: &Device) -> Result<Tensor> {
        let entry = self.entry(name)?;
        let data = self.finite(entry, range)?;
        self.load(entry, &data, dtype, device)
    }

    /// Looks through all tensors for numbers that are not finite, which takes as long as reading the files.
    ///
    /// # Errors
    /// The first tensor with one, by its file and name.
    pub fn scan(&self) -> Result<()> {
        let weights = self.entries.values().filter(|entry| unreadable(entry).is_none());
        weights.map(|entry| self.finite(entry, 0..entry.shape.iter().product())).try_for_each(|data| data.map(drop))
    }

    /// Elements `range` of a tensor as they are stored, all of them finite numbers.
    fn finite(&self, entry: &Entry, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let name = &entry.name;
        if let Some(problem) = unreadable(entry) {
            return Err(self.error_in(entry, format!("{name} {problem}")));
        }
        let data = self.data(entry, range.clone());
        match first_not_finite(entry.dtype, &data) {
            None => Ok(data),
            Some(at) => {
                let (at, all) = (range.start + at, entry.shape.iter().product::<usize>());
                Err(self.error_in(entry, not_finite(name, at, all)))
            }
        }
    }

    /// Reads a number that is no weight, such as a scale, of any type.
    ///
    /// # Errors
    /// There is no tensor of this name, it is more than one number, or it is not finite.
    pub(super) fn number(&self, name: &str) -> Result<f64> {
        let entry = self.entry(name)?;
        if entry.shape.iter().product::<usize>() != 1 {
            let message = format!("{} has shape {:?}, where one number is wanted", entry.name, entry.shape);
            return Err(self.error_in(entry, message));
        }
        let data = self.data(entry, 0..1);
        let number = self.load(entry, &data, DType::F64, &Device::Cpu)?.to_vec1::<f64>()?[0];
        match number.is_finite() {
            true => Ok(number),
            false => Err(self.error_in(entry, format!("{} is {number}; download it again", entry.name))),
        }
    }

    /// Elements `range` of a tensor as they are stored.
    pub(super) fn data(&self, entry: &Entry, range: Range<usize>) -> Cow<'_, [u8]> {
        let size = entry.dtype.bitsize() / 8;
        match self.bytes_of(entry, range.start * size..range.end * size).collect::<Vec<_>>().as_slice() {
            [one] => Cow::Borrowed(*one),
            several => Cow::Owned(several.concat()),
        }
    }

    fn load(&self, entry: &Entry, data: &[u8], dtype: DType, device: &Device) -> Result<Tensor> {
        let len = data.len() / (entry.dtype.bitsize() / 8);
        let tensor = TensorView::new(entry.dtype, vec![len], data)
            .map_err(candle_core::Error::from)
            .and_then(|view| view.load(device)?.to_dtype(dtype));
        let Entry { name, dtype, .. } = entry;
        tensor.map_err(|e| self.error_in(entry, format!("{name} of type {dtype:?} cannot be read: {e}")))
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
                Some(_) => problems.extend(self.unreadable(name).map(|problem| format!("{name} {problem}"))),
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
        self.with(entries.collect())
    }

    /// The same tensors under other names: `rename` gives one name and [`Rows::Same`] or [`Rows::HalvesSwapped`], or the
    /// names of the equal parts, top to bottom, into which the rows are divided. What it gives no name for is left out.
    ///
    /// # Errors
    /// The rows cannot be divided so, or two tensors get one name.
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
                Rows::Shared => Some(vec![entry.clone(); names.len()]),
            };
            let Some(parts) = parts else {
                let shape = &entry.shape;
                return Err(self.error(format!("{name} {shape:?} cannot be divided; is it of another model?")));
            };
            for (name, part) in names.into_iter().zip(parts) {
                if let Some(Entry { name: other, .. }) = entries.insert(name, part) {
                    let first = &entry.name;
                    return Err(self.error(format!("holds {other} and {first}, which are the same tensor; keep one")));
                }
            }
        }
        Ok(self.with(entries))
    }

    /// The bytes `wanted` of a tensor, as far as it has them, in pieces.
    pub(super) fn bytes_of(&self, entry: &Entry, wanted: Range<usize>) -> impl Iterator<Item = &[u8]> {
        let file = &self.files[entry.file];
        let mut place = 0;
        entry.ranges.iter().filter_map(move |range| {
            let inside = |at: usize| range.start + at.clamp(place, place + range.len()) - place;
            let bytes = &file.bytes[inside(wanted.start)..inside(wanted.end)];
            place += range.len();
            (!bytes.is_empty()).then_some(bytes)
        })
    }

    /// Why a tensor cannot be a weight, if it cannot.
    pub(super) fn unreadable(&self, name: &str) -> Option<String> {
        self.entries.get(name).and_then(unreadable)
    }

    /// An error about the file that holds a tensor.
    fn error_in(&self, entry: &Entry, message: String) -> Error {
        Error::File { path: self.files[entry.file].path.clone(), message }
    }

    /// An error about these files.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::File { path: self.path.clone(), message: message.into() }
    }
}

/// Why a tensor of this type cannot be a weight, if it cannot.
fn unreadable(entry: &Entry) -> Option<String> {
    let readable = [Dtype::F8_E4M3, Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64];
    let dtype = entry.dtype;
    (!readable.contains(&dtype)).then(|| {
        format!("is of type {dtype:?}, which is not read as a weight; take the model's files in f16, bf16 or f32")
    })
}
