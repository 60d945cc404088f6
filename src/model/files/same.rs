//! Whether weights are the same as others.

use super::Weights;
use super::weights::Entry;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

impl Weights {
    /// A digest of the tensors, for telling base models apart. Of one file below 1 GiB: of all its bytes. Of larger ones
    /// and of shards: of names, types and shapes, and of a page of 4 KiB at the start, the middle and the end of every
    /// tensor, so that a model of several gigabytes need not be read; the same in every layout.
    pub fn digest(&self) -> String {
        if let [file] = self.files.as_slice()
            && file.bytes.len() < 1 << 30
        {
            return blake3::hash(&file.bytes).to_hex().to_string();
        }
        self.sampled().to_hex().to_string()
    }

    /// The digest of names, types, shapes and pages.
    fn sampled(&self) -> blake3::Hash {
        const PAGE: usize = 4096;
        let mut hasher = blake3::Hasher::new();
        for (name, entry) in &self.entries {
            hasher.update(format!("{name} {:?} {:?}\n", entry.dtype, entry.shape).as_bytes());
            let length: usize = entry.ranges.iter().map(Range::len).sum();
            for start in [0, length / 2, length.saturating_sub(PAGE)] {
                self.bytes_of(entry, start..start + PAGE).for_each(|bytes| _ = hasher.update(bytes));
            }
        }
        hasher.finalize()
    }

    /// Weights of the same precision that lie in the same folder, do not count, and are others: a file or index that cannot
    /// be opened or whose tensors differ, and every shard that no index names.
    pub fn passed_over(&self) -> Vec<&Path> {
        let others = self.beside.iter().map(PathBuf::as_path);
        others.filter(|path| !Self::open(path).is_ok_and(|other| self.equals(&other))).collect()
    }

    /// Whether names, types, shapes and all values are the same.
    fn equals(&self, other: &Self) -> bool {
        let same = |((name, a), (other_name, b)): ((&String, &Entry), (&String, &Entry))| {
            let all = 0..a.shape.iter().product();
            (name, a.dtype, &a.shape) == (other_name, b.dtype, &b.shape)
                && self.data(a, all.clone()) == other.data(b, all)
        };
        self.entries.len() == other.entries.len() && self.entries.iter().zip(&other.entries).all(same)
    }

    /// Tells of [`Weights::passed_over`], once in the life of the program.
    pub(super) fn tell_passed_over(&self) {
        static TOLD: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
        // Files are checked before there is a log; they are opened again later.
        if self.beside.is_empty() || !tracing::enabled!(tracing::Level::WARN) {
            return;
        }
        if TOLD.lock().unwrap_or_else(PoisonError::into_inner).insert(self.path.clone()) {
            for other in self.passed_over() {
                let (path, other) = (self.path.display(), other.display());
                tracing::warn!("{other} is not read: {path} beside it counts and holds something else");
            }
        }
    }
}
