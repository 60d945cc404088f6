//! What `inspect` shows of a checkpoint.

use super::manifest::Manifest;
use super::reader::open;
use crate::error::Result;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// A checkpoint whose checksums are right. Shows as a table, serialises as the manifest with the sums over it.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// Its folder.
    pub path: PathBuf,
    /// Length of all shard files in bytes.
    pub bytes: u64,
    /// Names of the vectors.
    pub vectors: Vec<String>,
    /// What the manifest says.
    #[serde(flatten)]
    pub manifest: Manifest,
}

/// Describes the checkpoint in folder `path`, after comparing all its checksums.
///
/// # Errors
/// There is no whole checkpoint.
pub fn describe(path: &Path) -> Result<Description> {
    let reader = open(path)?;
    reader.verify()?;
    let manifest = reader.manifest().clone();
    Ok(Description {
        path: path.to_path_buf(),
        bytes: manifest.bytes(),
        vectors: manifest.vectors().to_vec(),
        manifest,
    })
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Manifest { format, streams, program_version, world_size, state, identity, shards } = &self.manifest;
        writeln!(f, "checkpoint   {}", self.path.display())?;
        writeln!(f, "update       {}", state.update)?;
        writeln!(f, "iteration    {}", state.iteration)?;
        writeln!(f, "parameters   {}", identity.total)?;
        writeln!(f, "vectors      {}", self.vectors.join(" "))?;
        writeln!(f, "size         {:.1} MiB, all checksums right", self.bytes as f64 / (1 << 20) as f64)?;
        writeln!(f, "written by   {world_size} ranks, version {program_version}, format {format}, streams {streams}")?;
        writeln!(f, "seed         {}", identity.seed)?;
        writeln!(f, "config       {}", identity.config_digest)?;
        writeln!(f, "base model   {}", identity.base_digest)?;
        writeln!(f, "layout       {}", identity.layout_digest)?;
        for (name, value) in state.extra.as_object().into_iter().flatten() {
            match value.as_array() {
                Some(entries) => entries.iter().try_for_each(|entry| writeln!(f, "{name:<12} {entry}"))?,
                None => writeln!(f, "{name:<12} {value}")?,
            }
        }
        writeln!(f, "\n{:<34} {:>24} {:>14}  blake3", "shard", "elements", "bytes")?;
        for shard in shards {
            let count: usize = shard.ranges.iter().map(std::ops::Range::len).sum();
            let elements = format!("{count} in {} ranges", shard.ranges.len());
            let checksum = shard.blake3.get(..16).unwrap_or(&shard.blake3);
            writeln!(f, "{:<34} {elements:>24} {:>14}  {checksum}", shard.file, shard.bytes)?;
        }
        Ok(())
    }
}
