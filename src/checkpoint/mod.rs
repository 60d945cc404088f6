//! Checkpoints: sharded by parameter ranges, whole or not there, readable at any number of ranks.
//!
//! ```text
//! OUT/checkpoints/update_00000100/
//!     manifest.json                        what it holds, of what model, every shard with ranges, length and checksum
//!     shard-00000-of-00008.safetensors     one f32 vector per name ("policy", "ema", ...) over its ranges
//!     COMPLETE                             the checksum of manifest.json, written last
//! OUT/checkpoints/BEST                     the name of the checkpoint with the best evaluation, which is kept
//! ```
//! A save is written into `.writing-update_00000100-GENERATION`, made durable and renamed. Readers look at `update_*`
//! folders with a `COMPLETE` only; all that a killed process can leave behind begins with a dot.
//! A checkpoint whose run drew other random numbers ([`crate::rng::STREAMS`]) can be used but not resumed.
//! Frozen weights are not inside: the manifest names them by digest.

mod describe;
mod folder;
mod manifest;
mod pieces;
mod reader;
mod saver;
mod writer;

pub use describe::{Description, describe};
pub use folder::{Found, Resume, clear_unfinished, find, list, newest, prune, set_best};
pub use manifest::{FORMAT, Identity, Manifest, Parameter, ShardEntry, TrainState};
pub use reader::{Reader, open};
pub use saver::{Saved, Saver};
pub use writer::{begin, commit, write_shard};

use crate::error::Error;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Ranges of the flat trainable parameters and every vector over them.
#[derive(Debug, Clone, PartialEq)]
pub struct Shard {
    /// Elements `[start, end)` of the unpadded flat parameters, in increasing order; none for a rank that owns nothing.
    pub ranges: Vec<Range<usize>>,
    /// By name, each of [`Shard::len`] elements, range after range.
    pub vectors: BTreeMap<String, Vec<f32>>,
}

impl Shard {
    /// Elements of each vector.
    pub fn len(&self) -> usize {
        self.ranges.iter().map(Range::len).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The folder of the checkpoints of a run folder.
pub fn root(out: &Path) -> std::path::PathBuf {
    out.join("checkpoints")
}

fn error(path: impl AsRef<Path>, message: impl Into<String>) -> Error {
    Error::Checkpoint { path: path.as_ref().to_path_buf(), message: message.into() }
}
