//! Reading: any range over any shards, at any number of ranks; nothing is taken whose checksum is wrong.
//!
//! Files are read, not mapped: a bad disk is then an error with the file's name and not the end of the process.

use super::manifest::{COMPLETE, Identity, MANIFEST, Manifest, ShardEntry, TrainState};
use super::pieces::{self, Content, Source, Wanted};
use super::{Shard, error};
use crate::digest;
use crate::error::{Error, Result};
use crate::params::Layout;
use crate::rng::STREAMS;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What to do about a checkpoint that is of something else than this run.
const REMEDY: &str = "use the configuration it was trained with, another checkpoint, or another --out";

/// Shard files that are read at the same time: the disks of a parallel file system work together, and a process may not
/// open any number of files.
const FILES: usize = 16;

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
/// length; [`Error::Io`] where the system cannot read it now. The content of the shards is not looked at: see [`Reader::verify`] and [`Reader::read`].
pub fn open(path: &Path) -> Result<Reader> {
    let complete = crate::fs::regular_bytes(&path.join(COMPLETE)).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            error(path, format!("has no file {COMPLETE}: not a checkpoint, or cut short in saving"))
        }
        _ => unreadable(path, COMPLETE, e),
    })?;
    let text = crate::fs::regular_bytes(&path.join(MANIFEST)).map_err(|e| unreadable(path, MANIFEST, e))?;
    if complete != format!("{}\n", digest::of(&text)).as_bytes() {
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

    /// Whether a run can go on from this checkpoint with the random numbers that it began with. Whatever else is done with
    /// its parameters needs no such check.
    ///
    /// # Errors
    /// [`Error::Checkpoint`]: it was written by a version with other streams.
    pub fn check_streams(&self) -> Result<()> {
        let Manifest { streams, program_version, format, .. } = &self.manifest;
        if *streams == STREAMS {
            return Ok(());
        }
        Err(error(
            &self.path,
            format!(
                "was written by a version {program_version} (format {format}) whose random numbers are others (streams \
                 {streams}, here {STREAMS}): from here on the run would be another one; finish it with the program that \
                 wrote it, or begin anew with another --out (export, sample, eval and inspect take it as it is)"
            ),
        ))
    }

    /// Where the trainable parameters lie in the vectors; none where an earlier version wrote the checkpoint.
    pub fn layout(&self) -> Option<Layout> {
        let parameters = &self.manifest.identity.parameters;
        let named = parameters.iter().map(|parameter| (parameter.name.as_str(), parameter.shape.as_slice()));
        Layout::of_named(named).filter(|_| !parameters.is_empty())
    }

    /// Whether this checkpoint can be resumed by the run `wanted`; returns warnings about what may differ and does. `changes`
    /// tells what of the configuration has changed, key by key, as far as that is known.
    ///
    /// # Errors
    /// Another base model or other trainable parameters.
    pub fn check_identity(&self, wanted: &Identity, changes: &[String]) -> Result<Vec<String>> {
        let held = &self.manifest.identity;
        if held.base_digest != wanted.base_digest {
            let of_model: Vec<&str> =
                changes.iter().map(String::as_str).filter(|change| change.starts_with("model.")).collect();
            let why = match of_model[..] {
                [] => {
                    format!("digest {}, now {}", digest::short(&held.base_digest), digest::short(&wanted.base_digest))
                }
                _ => of_model.join(", "),
            };
            return Err(error(&self.path, format!("is of another base model than this run's ({why}); {REMEDY}")));
        }
        self.check_parts(&wanted.parts)?;
        if (&held.layout_digest, held.total) != (&wanted.layout_digest, wanted.total) {
            return Err(error(
                &self.path,
                format!(
                    "has {} trainable elements (layout {}), this run has {} (layout {}); {REMEDY}",
                    held.total,
                    digest::short(&held.layout_digest),
                    wanted.total,
                    digest::short(&wanted.layout_digest)
                ),
            ));
        }
        let mut warnings = Vec::new();
        let path = self.path.display();
        // An earlier program took its digest of other keys: only what has changed key by key says anything of it.
        let form = |digest: &str| digest.split_once(':').map(|(_, form)| form.to_owned());
        let comparable = form(&held.config_digest) == form(&wanted.config_digest);
        let what = match changes {
            _ if held.config_digest == wanted.config_digest || self.manifest.streams != STREAMS => None,
            [] => comparable.then(|| {
                let [held, wanted] = [&held.config_digest, &wanted.config_digest].map(|d| digest::short(d));
                format!(" (digest {held}, now {wanted})")
            }),
            changes => Some(format!(": {}", changes.join(", "))),
        };
        if let Some(what) = what {
            warnings.push(format!("checkpoint {path}: the configuration has changed since{what}"));
        }
        if held.seed != wanted.seed {
            let (a, b) = (held.seed, wanted.seed);
            warnings.push(format!(
                "checkpoint {path}: the seed was {a} and is {b} now: the run is another one from here on"
            ));
        }
        Ok(warnings)
    }

    /// Refuses other text encoders or another decoder than those that the run was trained with, as far as both are known.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] that names the first part that differs.
    pub fn check_parts(&self, wanted: &BTreeMap<String, String>) -> Result<()> {
        let known = |(name, held)| Some((name, held, wanted.get(name)?));
        let held: &BTreeMap<String, String> = &self.manifest.identity.parts;
        match held.iter().filter_map(known).find(|(_, held, wanted)| held != wanted) {
            None => Ok(()),
            Some((name, held, wanted)) => {
                let [held, wanted] = [held, wanted].map(|digest| digest::short(digest));
                let message =
                    format!("was trained with another {name} than this run's (digest {held}, now {wanted}); {REMEDY}");
                Err(error(&self.path, message))
            }
        }
    }

    /// Compares the checksums of all shards, in parallel.
    ///
    /// # Errors
    /// A shard is damaged; the error names the file.
    pub fn verify(&self) -> Result<()> {
        self.take(self.manifest.shards.iter().map(|shard| (shard, Vec::new())).collect())
    }

    /// Every vector over `ranges`, from the shards that hold them, whose checksums are right.
    ///
    /// The whole of these shards is read, once; memory holds what is returned, and 2 MiB for each of the rank's threads.
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
        let len = ranges.iter().map(Range::len).sum();
        let mut vectors: BTreeMap<_, _> = names.iter().map(|name| (name.to_string(), vec![0.0; len])).collect();
        let moves = moves(&self.manifest.shards, ranges);
        let mut parts: BTreeMap<usize, Vec<Part>> = moves.iter().map(|part| (part.shard, Vec::new())).collect();
        for (name, vector) in &mut vectors {
            let mut rest = vector.as_mut_slice();
            for Move { shard, from, len, .. } in &moves {
                let (out, later) = rest.split_at_mut(*len);
                parts.entry(*shard).or_default().push(Part { name, from: *from, out });
                rest = later;
            }
        }
        self.take(parts.into_iter().map(|(shard, parts)| (&self.manifest.shards[shard], parts)).collect())?;
        Ok(Shard { ranges: ranges.to_vec(), vectors })
    }

    /// Reads whole shards, fills the parts that are wanted of them, and compares the checksums.
    fn take(&self, mut shards: Vec<(&ShardEntry, Vec<Part>)>) -> Result<()> {
        let mut errors = Vec::new();
        for shards in shards.chunks_mut(FILES) {
            let (sources, found): (Vec<_>, Vec<_>) = (shards.iter_mut())
                .map(|(shard, parts)| {
                    let path = self.path.join(&shard.file);
                    let bytes = shard.bytes as usize;
                    match find(&path, shard, std::mem::take(parts)) {
                        Ok((elements, wanted)) => (Source { path, bytes, wanted, elements }, Ok(())),
                        Err(e) => (Source { path, bytes, wanted: Vec::new(), elements: bytes }, Err(e)),
                    }
                })
                .unzip();
            for (((shard, _), content), found) in shards.iter().zip(pieces::read(sources)).zip(found) {
                errors.extend(self.check(shard, content, found).err());
            }
        }
        // Damage first: no other try mends it.
        let (damaged, unreadable): (Vec<_>, Vec<_>) =
            errors.into_iter().partition(|e| matches!(e, Error::Checkpoint { .. }));
        let count = damaged.len();
        match damaged.into_iter().chain(unreadable).next() {
            None => Ok(()),
            Some(Error::Checkpoint { path, message }) if count > 1 => {
                Err(error(path, format!("{message} ({} more files are damaged)", count - 1)))
            }
            Some(first) => Err(first),
        }
    }

    /// Whether the shard file is as it was written; and then only, whether its vectors were `found` in it, of finite numbers.
    fn check(&self, shard: &ShardEntry, content: io::Result<Content>, found: io::Result<()>) -> Result<()> {
        check_length(&self.path, shard)?;
        let failed = |e| unreadable(&self.path, &shard.file, e);
        let Content { hash, not_finite } = content.map_err(failed)?;
        let hash = hash.to_hex();
        if hash.as_str() != shard.blake3 {
            let what = format!("has checksum {hash}, the manifest says {}: it is damaged", shard.blake3);
            return Err(damaged(&self.path, &shard.file, &what));
        }
        found.map_err(failed)?;
        match not_finite {
            Some(byte) => {
                Err(damaged(&self.path, &shard.file, &format!("holds NaN or an infinite number at byte {byte}")))
            }
            None => Ok(()),
        }
    }
}

/// Elements that the vectors of a shard file and those that are read have in common.
struct Move {
    shard: usize,
    /// First element in the shard's vectors.
    from: usize,
    /// First element in the vectors that are read.
    to: usize,
    len: usize,
}

/// What the shards have of ranges that are `wanted` one after another, in the order of these: all of it, since the shards
/// cover everything once.
fn moves(shards: &[ShardEntry], wanted: &[Range<usize>]) -> Vec<Move> {
    let mut moves = Vec::new();
    for (shard, entry) in shards.iter().enumerate() {
        let mut from = 0;
        for held in &entry.ranges {
            let mut to = 0;
            for wanted in wanted {
                let (start, end) = (held.start.max(wanted.start), held.end.min(wanted.end));
                if start < end {
                    let (from, to) = (from + start - held.start, to + start - wanted.start);
                    moves.push(Move { shard, from, to, len: end - start });
                }
                to += wanted.len();
            }
            from += held.len();
        }
    }
    moves.sort_by_key(|part| part.to);
    moves
}

/// Elements of one vector of a shard file, from its element `from`, and where they go.
struct Part<'a> {
    name: &'a str,
    from: usize,
    out: &'a mut [f32],
}

/// Where the elements begin in the shard file, which holds the manifest's vectors and nothing else, and where the parts
/// stand. Its checksum has not been compared yet: whatever the header says, they lie within the length that the manifest
/// gives the file.
fn find<'a>(path: &Path, shard: &ShardEntry, parts: Vec<Part<'a>>) -> io::Result<(usize, Vec<Wanted<'a>>)> {
    let too_long = || io::Error::other("its vectors are longer than any file");
    let vector = shard.ranges.iter().map(Range::len).sum::<usize>().checked_mul(4).ok_or_else(too_long)?;
    let data = vector.checked_mul(shard.vectors.len()).filter(|data| *data <= usize::MAX - 8).ok_or_else(too_long)?;
    let mut file = crate::fs::regular(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let header = (shard.bytes as usize).checked_sub(8 + data).filter(|header| header % 4 == 0);
    let Some(header) = header.filter(|&header| header as u64 == u64::from_le_bytes(length)) else {
        return Err(io::Error::other("its header is not as long as its vectors leave room for"));
    };
    let mut json = vec![0; header];
    file.read_exact(&mut json)?;
    let metadata: Metadata = serde_json::from_slice(&json)?;
    let start = |name: &str| match metadata.info(name) {
        Some(TensorInfo { dtype: Dtype::F32, data_offsets: (start, end), .. })
            if end - start == vector && *end <= data =>
        {
            Ok(8 + header + start)
        }
        _ => Err(io::Error::other(format!("there is no f32 vector {name:?} of {vector} bytes in it"))),
    };
    for name in &shard.vectors {
        start(name)?; // those that nobody wants now, too
    }
    let wanted = parts.into_iter().map(|Part { name, from, out }| Ok(Wanted { start: start(name)? + 4 * from, out }));
    Ok((8 + header, wanted.collect::<io::Result<_>>()?))
}

fn check_length(folder: &Path, shard: &ShardEntry) -> Result<()> {
    let length = fs::metadata(folder.join(&shard.file)).map_err(|e| unreadable(folder, &shard.file, e))?.len();
    if length != shard.bytes {
        let what = format!("has {length} bytes, the manifest says {}: it is damaged", shard.bytes);
        return Err(damaged(folder, &shard.file, &what));
    }
    Ok(())
}

/// A file that is absent or too short is damage. Whatever else the system refuses (a disk or server that does not answer, no
/// permission, no descriptors) says nothing of what the file holds: nobody shall delete it for that.
fn unreadable(folder: &Path, file: &str, e: io::Error) -> Error {
    if e.raw_os_error().is_none() || e.kind() == io::ErrorKind::NotFound {
        return damaged(folder, file, &format!("cannot be read: {e}"));
    }
    let message = format!("cannot be read now, which is no damage: {e}; start again when it can be");
    Error::Io { path: folder.join(file), source: io::Error::new(e.kind(), message) }
}

/// Never goes back to an older checkpoint by itself: the user decides what to lose.
fn damaged(folder: &Path, file: &str, what: &str) -> Error {
    let remedy = format!("delete {} or give an older checkpoint with --resume", folder.display());
    error(folder.join(file), format!("{what}; {remedy}"))
}
