//! The manifest: what a checkpoint holds, of which model, and how to know that it is whole.

use crate::params::{Entry, Layout};
use crate::rng::STREAMS;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

/// Number of the format that this program writes.
pub const FORMAT: u32 = 3;
/// The oldest that it reads: without [`Manifest::streams`], which were the first ones.
const OLDEST: u32 = 2;
pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const COMPLETE: &str = "COMPLETE";

/// Where the run stood.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Optimizer steps taken.
    pub update: u64,
    /// Rollout rounds finished.
    pub iteration: u64,
    /// What else the run keeps that is small: its counters, which stages have begun. The run alone knows what that is.
    #[serde(default)]
    pub extra: serde_json::Value,
}

/// What a checkpoint must match to be resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Digest of the resolved configuration.
    pub config_digest: String,
    /// Digest of the frozen base model.
    pub base_digest: String,
    /// Digests of what stands before and behind the base model, by name: its text encoders, its decoder; empty where there is
    /// nothing of the kind, or an earlier version wrote the checkpoint.
    #[serde(default)]
    pub parts: BTreeMap<String, String>,
    /// Digest of the trainable parameters' names and shapes: [`crate::params::Layout::digest`].
    pub layout_digest: String,
    /// Number of trainable elements, without padding.
    pub total: usize,
    /// Seed of the run.
    pub seed: u64,
    /// The trainable parameters in the vectors' order, by which they can be used without the base model; empty where an
    /// earlier version wrote the checkpoint.
    #[serde(default)]
    pub parameters: Vec<Parameter>,
}

/// A trainable parameter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Identity {
    /// Of a run of this configuration and seed, which trains the parameters of `layout` on this base model, without
    /// [`Identity::parts`].
    pub fn new(config_digest: String, base_digest: String, layout: &Layout, seed: u64) -> Self {
        let parameter = |entry: &Entry| Parameter { name: entry.name.clone(), shape: entry.shape.clone() };
        Self {
            config_digest,
            base_digest,
            parts: BTreeMap::new(),
            layout_digest: layout.digest(),
            total: layout.total,
            seed,
            parameters: layout.entries.iter().map(parameter).collect(),
        }
    }
}

/// One shard file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// File name in the checkpoint's folder.
    pub file: String,
    /// Elements of the flat parameters, in increasing order.
    pub ranges: Vec<Range<usize>>,
    /// Names of the vectors over these ranges.
    pub vectors: Vec<String>,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// Checksum of the file, in hexadecimal.
    pub blake3: String,
}

/// The content of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`] of the program that wrote it.
    pub format: u32,
    /// [`STREAMS`] of the program that wrote it.
    #[serde(default = "first_streams")]
    pub streams: u32,
    /// Version of the program that wrote it.
    pub program_version: String,
    /// Number of ranks R that wrote it.
    pub world_size: usize,
    /// Where the run stood.
    pub state: TrainState,
    /// The model and the run.
    pub identity: Identity,
    /// The shards of all ranks in rank order, whose ranges cover `0..identity.total` without gap or overlap.
    pub shards: Vec<ShardEntry>,
}

impl Manifest {
    /// The manifest of shards written by this program, one per rank in rank order.
    ///
    /// # Errors
    /// The shards do not cover the parameters exactly once, or hold different vectors.
    pub(super) fn new(state: TrainState, identity: Identity, shards: Vec<ShardEntry>) -> Result<Self, String> {
        let program_version = env!("CARGO_PKG_VERSION").to_string();
        let (format, streams, world_size) = (FORMAT, STREAMS, shards.len());
        let manifest = Self { format, streams, program_version, world_size, state, identity, shards };
        manifest.check()?;
        Ok(manifest)
    }

    /// Reads `manifest.json`.
    ///
    /// # Errors
    /// Another format number, no manifest, or one that contradicts itself; the message has no path.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
            program_version: String,
        }
        let no_manifest = |e| format!("is not a checkpoint's manifest: {e}");
        // The number first: another format may have other fields.
        let head: Head = serde_json::from_slice(bytes).map_err(no_manifest)?;
        if !(OLDEST..=FORMAT).contains(&head.format) {
            return Err(format!(
                "has format {}, written by version {}; this is version {}, which reads formats {OLDEST} to {FORMAT}: \
                 use the version that wrote it",
                head.format,
                head.program_version,
                env!("CARGO_PKG_VERSION")
            ));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(no_manifest)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The names of the vectors, the same in every shard.
    pub fn vectors(&self) -> &[String] {
        self.shards.first().map_or(&[], |shard| &shard.vectors)
    }

    /// Length of all shard files in bytes.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }

    fn check(&self) -> Result<(), String> {
        let (written_by, count) = (self.world_size, self.shards.len());
        if written_by != count {
            return Err(format!("says that {written_by} ranks wrote it and lists {count} shards"));
        }
        let mut ranges: Vec<(usize, usize, usize)> = Vec::new();
        for (index, shard) in self.shards.iter().enumerate() {
            ranges.extend(shard.ranges.iter().map(|range| (range.start, range.end, index)));
            if shard.file != shard_name(index, self.shards.len()) {
                return Err(format!("shard {index} has the unexpected file name {:?}", shard.file));
            }
            if shard.vectors != self.vectors() {
                return Err(format!("shard {index} holds {:?}, but shard 0 {:?}", shard.vectors, self.vectors()));
            }
        }
        ranges.sort_unstable();
        let mut end = 0;
        for (start, range_end, index) in ranges {
            if start != end || range_end <= start {
                return Err(format!(
                    "shard {index} holds elements {start}..{range_end}, where a range must begin at {end}"
                ));
            }
            end = range_end;
        }
        if end != self.identity.total {
            return Err(format!("the shards end at element {end}, the model has {}", self.identity.total));
        }
        Ok(())
    }
}

/// The streams of checkpoints that do not name theirs.
fn first_streams() -> u32 {
    1
}

pub(super) fn shard_name(index: usize, count: usize) -> String {
    format!("shard-{index:05}-of-{count:05}.safetensors")
}
