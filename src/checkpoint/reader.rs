//! Reading: any range over any shards, at any number of ranks; nothing is taken whose checksum is wrong.
//!
//! Files are read, not mapped: a bad disk is then an error with the file's name and not the end of the process.

use super::manifest::{COMPLETE, Identity, MANIFEST, Manifest, ShardEntry, TrainState, digest};
use super::{Shard, error};
use crate::error::{Error, Result};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Elements read and converted at a time.
const BLOCK: usize = 1 << 18;

/// A complete checkpoint.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    manifest: Manifest,
}

/// Opens the checkpoint in folder `path`.
///
/// # Errors
/// Its saving was cut short, the manifest is damaged or of another format, or a shard file is missing or has another
/// length. The content of the shards is not looked at: see [`Reader::verify`] and [`Reader::read`].
pub fn open(path: &Path) -> Result<Reader> {
    let complete = fs::read(path.join(COMPLETE)).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            error(path, format!("has no file {COMPLETE}: not a checkpoint, or cut short in saving"))
        }
        _ => damaged(path, COMPLETE, &format!("cannot be read: {e}")),
    })?;
    let text = fs::read(path.join(MANIFEST)).map_err(|e| damaged(path, MANIFEST, &format!("cannot be read: {e}")))?;
    if complete != format!("{}\n", digest(&text)).as_bytes() {
        return Err(damaged(path, MANIFEST, &format!("has not the checksum in {COMPLETE}: one of the two is damaged")));
    }
    // The checksum is right, so what is wrong now is not damage.
    let manifest = Manifest::parse(&text).map_err(|e| error(path.join(MANIFEST), e))?;
    for shard in &manifest.shards {
        check_length(path, shard)?;
    }
    Ok(Reader { path: path.to_path_buf(), manifest })
}

impl Reader {
    /// The checkpoint's folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the manifest says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where the run stood.
    pub fn state(&self) -> &TrainState {
        &self.manifest.state
    }

    /// Whether this checkpoint can be resumed by the run `wanted`; returns warnings about what may differ and does.
    ///
    /// # Errors
    /// Another base model or other trainable parameters.
    pub fn check_identity(&self, wanted: &Identity) -> Result<Vec<String>> {
        const REMEDY: &str = "use the configuration it was trained with, another checkpoint, or --resume never";
        let held = &self.manifest.identity;
        if held.base_digest != wanted.base_digest {
            let (a, b) = (&held.base_digest, &wanted.base_digest);
            return Err(error(&self.path, format!("is of base model {a}, this run has base model {b}; {REMEDY}")));
        }
        if (&held.layout_digest, held.total) != (&wanted.layout_digest, wanted.total) {
            return Err(error(
                &self.path,
                format!(
                    "has {} trainable elements of layout {}, this run has {} of layout {}; {REMEDY}",
                    held.total, held.layout_digest, wanted.total, wanted.layout_digest
                ),
            ));
        }
        let mut warnings = Vec::new();
        let path = self.path.display();
        if held.config_digest != wanted.config_digest {
            let (a, b) = (&held.config_digest, &wanted.config_digest);
            warnings.push(format!("checkpoint {path}: the configuration has changed since (digest {a}, now {b})"));
        }
        if held.seed != wanted.seed {
            let (a, b) = (held.seed, wanted.seed);
            warnings.push(format!(
                "checkpoint {path}: the seed was {a} and is {b} now: the run is another one from here on"
            ));
        }
        Ok(warnings)
    }

    /// Compares the checksums of all shards, in parallel.
    ///
    /// # Errors
    /// A shard is damaged; the error names the file.
    pub fn verify(&self) -> Result<()> {
        self.verify_shards(&self.manifest.shards.iter().collect::<Vec<_>>())
    }

    /// Every vector over `ranges`, from the shards that hold them, whose checksums are compared first.
    ///
    /// # Errors
    /// A range ends after the last element, or a shard is damaged.
    pub fn read(&self, ranges: &[Range<usize>]) -> Result<Shard> {
        let names: Vec<&str> = self.manifest.vectors().iter().map(String::as_str).collect();
        self.read_vectors(&names, ranges)
    }

    /// The vectors `names` over `ranges`, for who needs some of them only.
    ///
    /// # Errors
    /// As [`Reader::read`], or there is no vector of that name.
    pub fn read_vectors(&self, names: &[&str], ranges: &[Range<usize>]) -> Result<Shard> {
        let total = self.manifest.identity.total;
        if let Some(range) = ranges.iter().find(|range| range.start > range.end || range.end > total) {
            return Err(error(&self.path, format!("has elements 0..{total}, there is no {range:?}")));
        }
        if let Some(name) = names.iter().find(|name| !self.manifest.vectors().iter().any(|held| held == *name)) {
            return Err(error(&self.path, format!("has no vector {name:?}, it has {:?}", self.manifest.vectors())));
        }
        let touched: Vec<(&ShardEntry, Vec<Move>)> = self
            .manifest
            .shards
            .iter()
            .map(|shard| (shard, moves(&shard.ranges, ranges)))
            .filter(|(_, moves)| !moves.is_empty())
            .collect();
        self.verify_shards(&touched.iter().map(|(shard, _)| *shard).collect::<Vec<_>>())?;

        let len = ranges.iter().map(Range::len).sum();
        let mut vectors: BTreeMap<_, _> = names.iter().map(|name| (name.to_string(), vec![0.0; len])).collect();
        for (shard, moves) in touched {
            fill(&self.path.join(&shard.file), &moves, &mut vectors)
                .map_err(|e| damaged(&self.path, &shard.file, &format!("cannot be read: {e}")))?;
        }
        Ok(Shard { ranges: ranges.to_vec(), vectors })
    }

    fn verify_shards(&self, shards: &[&ShardEntry]) -> Result<()> {
        let errors: Vec<Error> = shards.par_iter().filter_map(|shard| self.verify_shard(shard).err()).collect();
        let count = errors.len();
        match errors.into_iter().next() {
            None => Ok(()),
            Some(Error::Checkpoint { path, message }) if count > 1 => {
                Err(error(path, format!("{message} ({} more files are damaged)", count - 1)))
            }
            Some(first) => Err(first),
        }
    }

    fn verify_shard(&self, shard: &ShardEntry) -> Result<()> {
        check_length(&self.path, shard)?;
        let mut hasher = blake3::Hasher::new();
        File::open(self.path.join(&shard.file))
            .and_then(|file| hasher.update_reader(file).map(drop))
            .map_err(|e| damaged(&self.path, &shard.file, &format!("cannot be read: {e}")))?;
        let found = hasher.finalize().to_hex();
        if found.as_str() != shard.blake3 {
            let what = format!("has checksum {found}, the manifest says {}: it is damaged", shard.blake3);
            return Err(damaged(&self.path, &shard.file, &what));
        }
        Ok(())
    }
}

/// Elements that a vector of a file and a vector that is read have in common.
struct Move {
    /// First element in the file's vector.
    from: usize,
    /// First element in the vector that is read.
    to: usize,
    len: usize,
}

/// What ranges that are `held` one after another have for ranges that are `wanted` one after another.
fn moves(held: &[Range<usize>], wanted: &[Range<usize>]) -> Vec<Move> {
    let mut moves = Vec::new();
    let mut from = 0;
    for held in held {
        let mut to = 0;
        for wanted in wanted {
            let (start, end) = (held.start.max(wanted.start), held.end.min(wanted.end));
            if start < end {
                moves.push(Move { from: from + start - held.start, to: to + start - wanted.start, len: end - start });
            }
            to += wanted.len();
        }
        from += held.len();
    }
    moves
}

/// Reads what the shard file has for the vectors, all of them at once.
fn fill(path: &Path, moves: &[Move], vectors: &mut BTreeMap<String, Vec<f32>>) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let data_start = 8 + u64::from_le_bytes(length);
    let mut json = Vec::new();
    file.take(data_start - 8).read_to_end(&mut json)?;
    let metadata: Metadata = serde_json::from_slice(&json)?;

    vectors.par_iter_mut().try_for_each(|(name, out)| {
        let Some(info) = metadata.info(name).filter(|info| info.dtype == Dtype::F32 && info.shape.len() == 1) else {
            return Err(io::Error::other(format!("there is no f32 vector {name:?} in it")));
        };
        let mut file = File::open(path)?;
        let mut block = vec![0; 4 * BLOCK];
        for Move { from, to, len } in moves {
            file.seek(SeekFrom::Start(data_start + (info.data_offsets.0 + 4 * from) as u64))?;
            for out in out[*to..to + len].chunks_mut(BLOCK) {
                let part = &mut block[..4 * out.len()];
                file.read_exact(part)?;
                out.iter_mut().zip(part.as_chunks().0).for_each(|(x, &bytes)| *x = f32::from_le_bytes(bytes));
            }
        }
        Ok(())
    })
}

fn check_length(folder: &Path, shard: &ShardEntry) -> Result<()> {
    let length = fs::metadata(folder.join(&shard.file))
        .map_err(|e| damaged(folder, &shard.file, &format!("cannot be read: {e}")))?
        .len();
    if length != shard.bytes {
        let what = format!("has {length} bytes, the manifest says {}: it is damaged", shard.bytes);
        return Err(damaged(folder, &shard.file, &what));
    }
    Ok(())
}

/// Never goes back to an older checkpoint by itself: the user decides what to lose.
fn damaged(folder: &Path, file: &str, what: &str) -> Error {
    let remedy = format!("delete {} or give an older checkpoint with --resume", folder.display());
    error(folder.join(file), format!("{what}; {remedy}"))
}
