//! The files of a checkpoint: every rank writes its shard, rank 0 makes the whole of it. No communicator: the ranks
//! agree in [`super::Saver`].

use super::folder::{clear_unfinished, discard, folder_name, replaced_name, sync_folder, writing_name};
use super::manifest::{COMPLETE, Identity, MANIFEST, Manifest, ShardEntry, TrainState, shard_name};
use super::{Shard, error};
use crate::digest;
use crate::error::{Error, Result};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Elements converted, hashed and written at a time.
const BLOCK: usize = 1 << 18;

/// Makes the folder that the shards of this save are written into, and clears what killed saves have left. By rank 0.
///
/// # Errors
/// `root` cannot be written.
pub fn begin(root: &Path, update: u64, generation: u64) -> Result<PathBuf> {
    match fs::create_dir(root) {
        // Not the run folder: where that was removed nothing is to be saved.
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(Error::io(root)(e)),
        _ => clear_unfinished(root)?,
    }
    let writing = root.join(writing_name(update, generation));
    fs::create_dir(&writing).map_err(Error::io(&writing))?;
    Ok(writing)
}

/// Writes shard `index` of `count` into the folder made by [`begin`], durably.
///
/// # Errors
/// A vector is not as long as the ranges, or the file cannot be written.
pub fn write_shard(writing: &Path, index: usize, count: usize, shard: &Shard) -> Result<ShardEntry> {
    let (len, file) = (shard.len(), shard_name(index, count));
    let path = writing.join(&file);
    if let Some((name, vector)) = shard.vectors.iter().find(|(_, vector)| len != vector.len()) {
        return Err(error(path, format!("{name:?} has {} elements for ranges of {len}", vector.len())));
    }
    let header = header(shard).map_err(|e| error(&path, format!("the header cannot be made: {e}")))?;
    let (bytes, blake3) = write_synced(&path, |out| {
        out.write_all(&header)?;
        let mut block = Vec::with_capacity(4 * BLOCK);
        for part in shard.vectors.values().flat_map(|vector| vector.chunks(BLOCK)) {
            block.clear();
            block.extend(part.iter().flat_map(|x| x.to_le_bytes()));
            out.write_all(&block)?;
        }
        Ok(())
    })?;
    Ok(ShardEntry {
        file,
        ranges: shard.ranges.clone(),
        vectors: shard.vectors.keys().cloned().collect(),
        bytes,
        blake3,
    })
}

/// Makes the written shards, one per rank in rank order, a checkpoint and returns its folder. By rank 0, after every
/// rank has written its shard.
///
/// # Errors
/// The shards do not cover the parameters exactly once, one is not there with the length that its rank wrote, or the
/// folder cannot be written.
pub fn commit(
    root: &Path,
    state: &TrainState,
    identity: &Identity,
    shards: Vec<ShardEntry>,
    generation: u64,
) -> Result<PathBuf> {
    let path = root.join(folder_name(state.update));
    let writing = root.join(writing_name(state.update, generation));
    let manifest = Manifest::new(state.clone(), identity.clone(), shards).map_err(|e| error(&path, e))?;
    for shard in &manifest.shards {
        let file = writing.join(&shard.file);
        let length = fs::metadata(&file).map_err(Error::io(&file))?.len();
        if length != shard.bytes {
            return Err(error(file, format!("has {length} bytes, but {} were written", shard.bytes)));
        }
    }
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| error(&path, format!("manifest: {e}")))?;
    write_synced(&writing.join(MANIFEST), |out| out.write_all(&text))?;
    sync_folder(&writing)?;
    write_synced(&writing.join(COMPLETE), |out| writeln!(out, "{}", digest::of(&text)))?;
    sync_folder(&writing)?;

    let replaced = root.join(replaced_name(state.update, generation));
    if path.exists() {
        fs::rename(&path, &replaced).map_err(Error::io(&path))?;
    }
    fs::rename(&writing, &path).map_err(Error::io(&writing))?;
    sync_folder(root)?;
    if replaced.exists() {
        // The new checkpoint is good whether the old one goes now or at the next save.
        let _ = discard(&replaced);
    }
    Ok(path)
}

/// Writes a file and makes its content durable; its length in bytes and its checksum.
fn write_synced(path: &Path, write: impl FnOnce(&mut Hashed) -> io::Result<()>) -> Result<(u64, String)> {
    let result = File::create(path).and_then(|file| {
        let mut out = Hashed { file, hasher: blake3::Hasher::new() };
        write(&mut out)?;
        out.file.sync_all()?;
        Ok((out.hasher.count(), out.hasher.finalize().to_hex().to_string()))
    });
    result.map_err(|source| match source.kind() {
        // Rank 0 has made the folder before: it is elsewhere.
        io::ErrorKind::NotFound => error(
            path,
            "the folder made by rank 0 is not here; the run folder must be on a filesystem that all nodes share",
        ),
        _ => Error::Io { path: path.to_path_buf(), source },
    })
}

/// A file and the checksum of what was meant to be in it, not of what came back from the disk.
struct Hashed {
    file: File,
    hasher: blake3::Hasher,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The safetensors header: its length in 8 bytes, then JSON, padded to a multiple of 8.
fn header(shard: &Shard) -> std::result::Result<Vec<u8>, Box<dyn std::error::Error>> {
    let bytes = 4 * shard.len();
    let tensors = shard.vectors.keys().enumerate().map(|(i, name)| {
        let data_offsets = (i * bytes, (i + 1) * bytes);
        (name.clone(), TensorInfo { dtype: Dtype::F32, shape: vec![shard.len()], data_offsets })
    });
    let mut json = serde_json::to_vec(&Metadata::new(None, tensors.collect())?)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes(), json.as_slice()].concat())
}
