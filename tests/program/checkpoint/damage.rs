//! Every damage is found, and named with its file.

use super::ranks::{read, saved};
use super::{TOTAL, files};
use flowrl_dist::checkpoint::{Resume, describe, find, newest, open};
use flowrl_dist::digest;
use flowrl_dist::error::Error;
use flowrl_dist::rng::{Purpose, Stream};
use std::fs;
use std::path::Path;

#[test]
fn damage_in_any_piece_of_large_shards_is_found() {
    let (dir, total) = (tempfile::tempdir().unwrap(), 700_001);
    let path = saved(dir.path(), 1, 2, total);
    let shards = ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"].map(|name| path.join(name));
    let flip = |file: &Path, place: usize| {
        let mut bytes = fs::read(file).unwrap();
        bytes[place] ^= 1;
        fs::write(file, bytes).unwrap();
    };
    let length = fs::metadata(&shards[1]).unwrap().len() as usize;
    assert!(length > 6 << 20 && !length.is_multiple_of(1 << 20), "{length} bytes are not what is tested here");
    for place in [0, 8, (1 << 20) - 1, 1 << 20, (5 << 20) + 7, 6 << 20, length - 1] {
        flip(&shards[1], place);
        found(&path, total, &shards[1], &format!("byte {place}"));
        // Also by a rank that wants nothing of what is damaged.
        let error = read(&open(&path).unwrap(), total / 2 + 99_999..total / 2 + 100_000).unwrap_err().to_string();
        assert!(error.contains("has checksum") && !error.contains("more files"), "byte {place}: {error}");
        flip(&shards[1], place);
    }
    shards.iter().for_each(|shard| flip(shard, length - 20_000));
    found(&path, total, &shards[0], "and the other one");
    let error = read(&open(&path).unwrap(), 0..total).unwrap_err().to_string();
    assert!(error.ends_with("(1 more files are damaged)"), "{error}");
}

/// Both ways of reading the checkpoint name the file that was damaged, in one line with the remedy.
fn found(path: &Path, total: usize, file: &Path, damage: &str) {
    let name = file.file_name().unwrap().to_str().unwrap();
    let errors = [
        open(path).and_then(|reader| reader.verify()).unwrap_err().to_string(),
        open(path).and_then(|reader| read(&reader, 0..total)).unwrap_err().to_string(),
    ];
    for error in errors {
        assert!(error.contains(name) && error.contains("--resume"), "{name} {damage}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn every_flipped_byte_and_every_cut_is_found_and_its_file_named() {
    const PLACES: u32 = 200;
    let dir = tempfile::tempdir().unwrap();
    let path = saved(dir.path(), 5, 3, TOTAL);
    for (number, file) in files(&path).into_iter().enumerate() {
        let good = fs::read(&file).unwrap();
        let last = good.len() - 1;
        let random = Stream::new(1, Purpose::Rollout, [number as u64, 0, 0, 0]);
        let places = (0..PLACES).map(|i| random.below(i, good.len())).chain([0, last]);
        for (i, place) in places.enumerate() {
            let mut bad = good.clone();
            bad[place] ^= 1 << (i % 8);
            fs::write(&file, &bad).unwrap();
            found(&path, TOTAL, &file, &format!("byte {place}"));
            fs::write(&file, &good[..place]).unwrap();
            found(&path, TOTAL, &file, &format!("cut to {place}"));
        }
        fs::write(&file, [good.as_slice(), b"x"].concat()).unwrap();
        found(&path, TOTAL, &file, "with a byte more");
        fs::remove_file(&file).unwrap();
        let error = open(&path).unwrap_err().to_string();
        assert!(error.contains(file.file_name().unwrap().to_str().unwrap()), "{error}");
        fs::write(&file, &good).unwrap();
    }
    open(&path).unwrap().verify().unwrap();
}

#[test]
fn auto_does_not_go_back_silently_from_a_damaged_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path(), 5, 2, TOTAL);
    let path = saved(dir.path(), 6, 2, TOTAL);
    let shard = path.join("shard-00001-of-00002.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&shard, bytes).unwrap();
    let found = find(&Resume::Auto, dir.path()).unwrap().unwrap();
    assert_eq!(found, path);
    let reader = open(&found).unwrap();
    read(&reader, 0..10).expect("the first shard is good");
    let error = read(&reader, TOTAL - 10..TOTAL).unwrap_err().to_string();
    assert!(error.contains("shard-00001-of-00002") && error.contains("delete"), "{error}");
}

/// A link that leads to itself stands for a server that does not answer and for a lack of descriptors: nothing is known of the
/// content, so nothing is to be deleted.
#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_read_now_is_not_called_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let path = saved(dir.path(), 5, 2, TOTAL);
    for name in ["COMPLETE", "manifest.json", "shard-00001-of-00002.safetensors"] {
        let (file, aside) = (path.join(name), dir.path().join("aside"));
        let reader = open(&path).unwrap();
        fs::rename(&file, &aside).unwrap();
        std::os::unix::fs::symlink(name, &file).unwrap();
        let mut errors = vec![open(&path).unwrap_err()];
        if name.starts_with("shard") {
            errors.push(reader.verify().unwrap_err());
        }
        for error in errors {
            assert!(matches!(error, Error::Io { .. }), "{error:?}");
            let message = error.to_string();
            assert!(message.contains(name) && message.contains("start again"), "{message}");
            assert!(!message.contains("delete"), "{message}");
        }
        fs::rename(&aside, &file).unwrap();
    }
    open(&path).unwrap().verify().unwrap();
}

#[test]
fn a_manifest_that_is_not_ours_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = saved(dir.path(), 5, 2, TOTAL);
    let text = fs::read_to_string(path.join("manifest.json")).unwrap();
    let changes = [
        (r#""format": 3"#, r#""format": 4"#, "reads formats 2 to 3"),
        (r#""total": 1003"#, r#""total": 1004"#, "1004"),
        (r#""start": 334"#, r#""start": 333"#, "333"),
        ("shard-00000-of-00002", "../../etc", "file name"),
    ];
    for (old, new, wanted) in changes {
        let changed = text.replace(old, new);
        assert_ne!(changed, text);
        fs::write(path.join("manifest.json"), &changed).unwrap();
        fs::write(path.join("COMPLETE"), digest::of(changed.as_bytes()) + "\n").unwrap();
        let error = open(&path).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

/// Written by the program before the streams were named as they are now: whole, but nothing to go on from.
#[test]
fn a_checkpoint_of_other_random_numbers_is_read_and_not_continued() {
    let old = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoint_format_2/checkpoints");
    let reader = open(&newest(&old).unwrap().unwrap().path).unwrap();
    reader.verify().unwrap();
    assert_eq!((reader.state().update, reader.manifest().streams, reader.manifest().format), (2, 1, 2));
    assert_eq!(reader.read_vectors(&["ema"], std::slice::from_ref(&(0..1920))).unwrap().vectors["ema"].len(), 1920);
    let error = reader.check_streams().unwrap_err().to_string();
    for part in
        ["update_00000002: was written by a version 0.1.0 (format 2)", "finish it with the program that wrote it"]
    {
        assert!(error.contains(part), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    open(&saved(dir.path(), 5, 1, 10)).unwrap().check_streams().unwrap();
}

/// Somebody changed a shard and made every checksum over it again: what reading it refuses, describing it refuses.
#[test]
fn a_checkpoint_that_was_sealed_again_round_other_content_is_refused() {
    let reseal = |change: &dyn Fn(&mut Vec<u8>)| {
        let dir = tempfile::tempdir().unwrap();
        let path = saved(dir.path(), 5, 2, TOTAL);
        let (shard, manifest) = (path.join("shard-00001-of-00002.safetensors"), path.join("manifest.json"));
        let mut bytes = fs::read(&shard).unwrap();
        let sum = digest::of(&bytes);
        change(&mut bytes);
        fs::write(&shard, &bytes).unwrap();
        let text = fs::read_to_string(&manifest).unwrap().replace(&sum, &digest::of(&bytes));
        fs::write(&manifest, &text).unwrap();
        fs::write(path.join("COMPLETE"), digest::of(text.as_bytes()) + "\n").unwrap();
        let read = open(&path).unwrap().read(std::slice::from_ref(&(0..TOTAL))).map(drop).map_err(|e| e.to_string());
        assert_eq!(describe(&path).map(drop).map_err(|e| e.to_string()), read);
        read
    };
    assert_eq!(reseal(&|_| ()), Ok(()));
    let header = |bytes: &mut Vec<u8>, old: &str, new: &str| {
        let at = bytes.windows(old.len()).position(|window| window == old.as_bytes()).unwrap();
        bytes.splice(at..at + old.len(), new.bytes());
    };
    for (change, wanted) in [
        (
            &(|bytes: &mut Vec<u8>| header(bytes, "\"policy\"", "\"polite\"")) as &dyn Fn(&mut Vec<u8>),
            "no f32 vector \"policy\"",
        ),
        (&|bytes| header(bytes, "\"F32\"", "\"U32\""), "there is no f32 vector"),
        (&|bytes| bytes[0] ^= 8, "its header is not as long as its vectors leave room for"),
        (
            &|bytes| {
                let end = bytes.len();
                bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
            },
            "holds NaN or an infinite number at byte",
        ),
    ] {
        let message = reseal(change).unwrap_err();
        assert!(message.contains("shard-00001-of-00002.safetensors") && message.contains(wanted), "{message}");
    }
}
