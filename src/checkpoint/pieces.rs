//! Files read in pieces, by many threads: each byte once, hashed and taken where it lies.
//!
//! A piece is a whole subtree of BLAKE3's tree (section 2.1 of its paper). So pieces are hashed in any order and by any
//! thread, and the checksum of the file is put together from theirs.

use crate::fs;
use blake3::Hash;
use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a piece, a power of two: as much as a disk, or a server of a parallel file system, is asked for at a time, and
/// still in a core's cache when it is hashed and converted.
const PIECE: usize = 1 << 20;

/// Threads that read for each of the rank's threads: while one waits for the disk, another one computes.
const READERS: usize = 2;

/// A file, and what is wanted of it.
pub(super) struct Source<'a> {
    pub path: PathBuf,
    /// Its length.
    pub bytes: usize,
    /// Within that length.
    pub wanted: Vec<Wanted<'a>>,
    /// From this byte on, a multiple of 4, it holds f32 elements.
    pub elements: usize,
}

/// What a file was found to hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Content {
    /// Its checksum.
    pub hash: Hash,
    /// The first byte of an element that is NaN or infinite.
    pub not_finite: Option<usize>,
}

/// f32 elements that stand one after another in a file, little-endian, and where they go.
pub(super) struct Wanted<'a> {
    /// Their first byte, a multiple of 4.
    pub start: usize,
    pub out: &'a mut [f32],
}

/// Reads the files side by side, fills what is wanted of them, and returns what each holds, or why it cannot be read.
/// What is filled is to be used only if the checksum is right.
///
/// Beside what is filled, memory holds [`READERS`] pieces for each of the rank's threads.
pub(super) fn read(sources: Vec<Source>) -> Vec<io::Result<Content>> {
    let mut pieces = Vec::new();
    let hashes = sources.into_iter().enumerate().map(|(index, source)| {
        let of_file = source.pieces(index)?;
        let hashes = vec![(ChainingValue::default(), None); of_file.len()];
        pieces.extend(of_file);
        Ok(hashes)
    });
    let hashes: Mutex<Vec<io::Result<Vec<Found>>>> = Mutex::new(hashes.collect());
    pieces.sort_by_key(|piece| piece.number);
    let threads = pieces.len().min(READERS * rayon::current_num_threads());
    let pieces = Mutex::new(pieces.into_iter());

    let work = || {
        let mut buffer = vec![0; PIECE];
        // A statement of its own, so that the lock is released before the piece is read.
        while let Some(piece) = { lock(&pieces).next() } {
            let (source, number) = (piece.source, piece.number);
            // The first error of a file is enough: each one may take a bad disk long.
            if lock(&hashes)[source].is_err() {
                continue;
            }
            let hash = piece.read(&mut buffer);
            let of_file = &mut lock(&hashes)[source];
            match (hash, &mut *of_file) {
                (Ok(hash), Ok(hashes)) => hashes[number] = hash,
                (Err(e), _) => *of_file = Err(e),
                (Ok(_), Err(_)) => {}
            }
        }
    };
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let hashes = hashes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let content = |found: Vec<Found>| {
        let (hashes, not_finite): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        Content { hash: root(&hashes), not_finite: not_finite.into_iter().flatten().next() }
    };
    hashes.into_iter().map(|found| found.map(content)).collect()
}

/// A piece's place in the file's tree, and the first byte of an element in it that is not finite.
type Found = (ChainingValue, Option<usize>);

/// A piece of a file, and what is wanted of it.
struct Piece<'a> {
    file: Arc<File>,
    /// Of the file.
    source: usize,
    number: usize,
    bytes: usize,
    /// Whether it is all of the file.
    whole: bool,
    /// Starts count from the piece's first byte.
    wanted: Vec<Wanted<'a>>,
    /// Counts from it as well.
    elements: usize,
}

impl<'a> Source<'a> {
    /// Opens the file and cuts it: one piece at least, and all but the last one of full length.
    fn pieces(self, source: usize) -> io::Result<Vec<Piece<'a>>> {
        let file = Arc::new(fs::regular(&self.path)?);
        let count = self.bytes.div_ceil(PIECE).max(1);
        let piece = |number| Piece {
            file: file.clone(),
            source,
            number,
            bytes: PIECE.min(self.bytes - number * PIECE),
            whole: count == 1,
            wanted: Vec::new(),
            elements: self.elements.saturating_sub(number * PIECE),
        };
        let mut pieces: Vec<Piece> = (0..count).map(piece).collect();
        for Wanted { mut start, mut out } in self.wanted {
            while !out.is_empty() {
                let fit = (PIECE - start % PIECE) / 4;
                let (here, later) = out.split_at_mut(fit.min(out.len()));
                let bytes = 4 * here.len();
                pieces[start / PIECE].wanted.push(Wanted { start: start % PIECE, out: here });
                (start, out) = (start + bytes, later);
            }
        }
        Ok(pieces)
    }
}

impl Piece<'_> {
    /// Fills what is wanted of the piece, and returns what it was found to hold.
    fn read(self, buffer: &mut [u8]) -> io::Result<Found> {
        let bytes = &mut buffer[..self.bytes];
        let offset = (self.number * PIECE) as u64;
        self.file.read_exact_at(bytes, offset)?;
        for Wanted { start, out } in self.wanted {
            let (elements, _) = bytes[start..].as_chunks();
            out.iter_mut().zip(elements).for_each(|(x, &bytes)| *x = f32::from_le_bytes(bytes));
        }
        let not_finite = bytes.get(self.elements..).and_then(first_not_finite);
        let not_finite = not_finite.map(|at| offset as usize + self.elements + at);
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(offset).update(bytes);
        Ok((if self.whole { hasher.finalize().into() } else { hasher.finalize_non_root() }, not_finite))
    }
}

/// The first byte of an f32 that is NaN or infinite.
fn first_not_finite(bytes: &[u8]) -> Option<usize> {
    let is_bad = |element: &[u8; 4]| u32::from_le_bytes(*element) & 0x7f80_0000 == 0x7f80_0000;
    let (elements, _) = bytes.as_chunks::<4>();
    // Without a branch first, which keeps up with memory.
    let any = elements.iter().fold(0, |found, element| found | u16::from(is_bad(element)));
    (any != 0).then(|| elements.iter().position(is_bad).map(|at| 4 * at))?
}

/// The checksum of a file out of its pieces': of one, it is that one.
fn root(pieces: &[ChainingValue]) -> Hash {
    match pieces {
        [whole] => Hash::from_bytes(*whole),
        _ => {
            let (left, right) = halves(pieces);
            merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

fn subtree(pieces: &[ChainingValue]) -> ChainingValue {
    match pieces {
        [piece] => *piece,
        _ => {
            let (left, right) = halves(pieces);
            merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

/// The left half of a tree is the largest full one that leaves something for the right half.
fn halves(pieces: &[ChainingValue]) -> (&[ChainingValue], &[ChainingValue]) {
    pieces.split_at(pieces.len().next_power_of_two() / 2)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    /// Lengths around those where the tree changes its shape, and ranges that cut pieces at odd places.
    #[test]
    fn checksums_and_elements_are_those_of_the_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let lengths =
            [0, 1, 1024, 1028, PIECE - 4, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 1028, 5 * PIECE - 4, 8 * PIECE];
        let files: Vec<Vec<u8>> = (lengths.iter().enumerate())
            .map(|(i, &bytes)| {
                let random = Stream::new(1, Purpose::Rollout, [i as u64, 0, 0, 0]);
                let words = (0..bytes.div_ceil(8) as u32).flat_map(|word| random.word(word).to_le_bytes());
                words.take(bytes).collect()
            })
            .collect();
        let ranges = |bytes: usize| {
            let lengths = [1, 5, PIECE / 4 - 3, 2, PIECE / 2 + 1, 1, PIECE].into_iter().cycle();
            let starts = lengths.clone().scan(0, |end, len| {
                *end += len + 3;
                Some(*end - len)
            });
            starts
                .zip(lengths)
                .map(move |(start, len)| start..(start + len).min(bytes / 4))
                .take_while(|r| r.start < r.end)
        };
        let mut read_elements: Vec<Vec<Vec<f32>>> =
            lengths.iter().map(|&bytes| ranges(bytes).map(|range| vec![0.0; range.len()]).collect()).collect();
        let sources = (files.iter().zip(&mut read_elements).enumerate())
            .map(|(i, (bytes, read))| {
                let path = dir.path().join(i.to_string());
                std::fs::write(&path, bytes).unwrap();
                let wanted = ranges(bytes.len()).zip(read).map(|(range, out)| Wanted { start: 4 * range.start, out });
                Source { path, bytes: bytes.len(), wanted: wanted.collect(), elements: bytes.len() }
            })
            .collect();
        let hashes = read(sources);
        for ((bytes, hash), read) in files.iter().zip(hashes).zip(read_elements) {
            assert_eq!(hash.unwrap().hash, blake3::hash(bytes), "{} bytes", bytes.len());
            for (range, read) in ranges(bytes.len()).zip(read) {
                let read: Vec<u8> = read.iter().flat_map(|x| x.to_le_bytes()).collect();
                assert!(read == bytes[4 * range.start..4 * range.end], "{range:?} of {} bytes", bytes.len());
            }
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_does_not_keep_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let source = |name: &str, bytes| Source { path: dir.path().join(name), bytes, wanted: Vec::new(), elements: 0 };
        let content = vec![7; 3 * PIECE];
        std::fs::write(dir.path().join("good"), &content).unwrap();
        std::fs::write(dir.path().join("short"), &content[1..]).unwrap();
        let read = read(vec![source("missing", 3 * PIECE), source("short", 3 * PIECE), source("good", 3 * PIECE)]);
        let kinds: Vec<_> = read.iter().map(|content| content.as_ref().map_err(io::Error::kind)).collect();
        let whole = Content { hash: blake3::hash(&content), not_finite: None };
        assert_eq!(kinds, [Err(io::ErrorKind::NotFound), Err(io::ErrorKind::UnexpectedEof), Ok(&whole)]);
    }

    #[test]
    fn a_number_that_is_none_is_found_in_every_piece_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let (path, header) = (dir.path().join("file"), 12);
        for at in [None, Some(header), Some(PIECE - 4), Some(PIECE), Some(2 * PIECE + 16)] {
            let mut bytes = vec![0xff; header]; // what is no element may be anything
            bytes.resize(3 * PIECE, 1);
            if let Some(at) = at {
                bytes[at..at + 4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
            }
            std::fs::write(&path, &bytes).unwrap();
            let source = Source { path: path.clone(), bytes: bytes.len(), wanted: Vec::new(), elements: header };
            assert_eq!(read(vec![source])[0].as_ref().unwrap().not_finite, at);
        }
    }
}
