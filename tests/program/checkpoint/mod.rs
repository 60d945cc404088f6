//! Checkpoints: whole or not there, at any number of ranks, and every damage found.

mod kill;
mod ranks;
mod saving;

use flowrl_dist::checkpoint::{
    Found, Resume, Shard, TrainState, begin, clear_unfinished, commit, describe, find, list, newest, open, write_shard,
};
use flowrl_dist::comm::Solo;
use flowrl_dist::digest;
use flowrl_dist::error::Error;
use flowrl_dist::rng::{Purpose, Stream};
use ranks::{VECTORS, content, content_of, identity, owned, read, save, save_with, saved, state};
use std::fs;
use std::path::{Path, PathBuf};

const TOTAL: usize = 1003;

fn bits(shard: &Shard) -> Vec<(String, Vec<u32>)> {
    shard.vectors.iter().map(|(name, v)| (name.clone(), v.iter().map(|x| x.to_bits()).collect())).collect()
}

fn files(path: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn what_is_saved_is_read_at_every_number_of_ranks() {
    for (total, writers) in [(TOTAL, 4), (TOTAL, 1), (10, 4), (10, 8), (3, 8), (1, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let reader = open(&saved(dir.path(), 5, writers, total)).unwrap();
        reader.verify().unwrap();
        assert_eq!(*reader.state(), state(5));
        assert_eq!(reader.manifest().identity, identity(total));
        assert_eq!(reader.manifest().world_size, writers);
        for readers in [1, 2, 3, 4, 8, 16] {
            for rank in 0..readers {
                let ranges = owned(rank, readers, total);
                let read = reader.read(&ranges).unwrap();
                assert_eq!(read.ranges, ranges);
                assert_eq!(bits(&read), bits(&content_of(5, ranges)), "{total} elements, {writers} -> {readers} ranks");
            }
        }
    }
}

/// Files of 6.7 MiB, read in pieces of 1 MiB: ranges cut pieces anywhere, vectors begin and end inside of them.
#[test]
fn any_ranges_of_large_shards_come_back() {
    let (dir, total) = (tempfile::tempdir().unwrap(), 700_001);
    let reader = open(&saved(dir.path(), 1, 2, total)).unwrap();
    reader.verify().unwrap();
    let some = vec![1..2, 5..262_149, 262_150..262_151, 300_001..466_670, 600_000..total - 1];
    let (all, last) = (0..total, total - 1..total);
    for ranges in [Vec::from([all]), some, Vec::from([last])] {
        assert_eq!(bits(&reader.read(&ranges).unwrap()), bits(&content_of(1, ranges.clone())), "{ranges:?}");
        let one = reader.read_vectors(&["exp_avg_sq"], &ranges).unwrap();
        assert!(one.vectors["exp_avg_sq"] == content_of(1, ranges).vectors["exp_avg_sq"]);
    }
}

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

#[test]
fn a_part_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let reader = open(&saved(dir.path(), 5, 4, TOTAL)).unwrap();
    let ema = reader.read_vectors(&["ema"], &[200..250, 250..300]).unwrap();
    assert_eq!(ema.vectors.len(), 1);
    assert_eq!(ema.vectors["ema"], content(5, 200..300).vectors["ema"]);
    let error = reader.read_vectors(&["emma"], &[]).unwrap_err().to_string();
    assert!(error.contains("\"emma\"") && error.contains("exp_avg_sq"), "{error}");
    let error = read(&reader, 0..TOTAL + 1).unwrap_err().to_string();
    assert!(error.contains("0..1004") && error.contains("0..1003"), "{error}");
}

#[test]
fn shards_are_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(saved(dir.path(), 5, 4, TOTAL).join("shard-00001-of-00004.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), VECTORS.len());
    let policy = tensors.tensor("policy").unwrap();
    assert_eq!((policy.shape(), policy.dtype()), (&[251][..], safetensors::Dtype::F32));
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

#[test]
fn another_model_is_refused_and_another_config_only_warned_about() {
    let dir = tempfile::tempdir().unwrap();
    let reader = open(&saved(dir.path(), 5, 2, TOTAL)).unwrap();
    let ours = identity(TOTAL);
    assert_eq!(reader.check_identity(&ours, &[]).unwrap(), Vec::<String>::new());

    let mut other = ours.clone();
    other.base_digest = digest::of(b"other base");
    let error = reader.check_identity(&other, &[]).unwrap_err().to_string();
    assert!(error.contains(&ours.base_digest[..12]) && error.contains(&other.base_digest[..12]), "{error}");
    let changes = ["optim.lr 0.1 -> 0.2", "model.kind \"glyphs\" -> \"sd35-medium\""].map(String::from);
    let error = reader.check_identity(&other, &changes).unwrap_err().to_string();
    assert!(error.contains("than this run's (model.kind \"glyphs\" -> \"sd35-medium\");"), "{error}");

    let mut other = ours.clone();
    other.layout_digest = digest::of(b"other layout");
    let error = reader.check_identity(&other, &[]).unwrap_err().to_string();
    assert!(error.contains(&ours.layout_digest[..12]) && error.contains(&other.layout_digest[..12]), "{error}");

    let mut other = ours.clone();
    (other.config_digest, other.seed) = (digest::of(b"other config"), 43);
    let warnings = reader.check_identity(&other, &[]).unwrap();
    assert_eq!(warnings.len(), 2);
    assert!(warnings[0].contains(&other.config_digest) && warnings[1].contains("43"), "{warnings:?}");
    let changes = ["optim.lr 0.1 -> 0.2", "batch.prompts 1 -> 2"].map(String::from);
    let warnings = reader.check_identity(&other, &changes).unwrap();
    assert!(warnings[0].ends_with("changed since: optim.lr 0.1 -> 0.2, batch.prompts 1 -> 2"), "{warnings:?}");
}

#[test]
fn unfinished_folders_are_ignored_and_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    assert_eq!(newest(&root.join("absent")).unwrap(), None);
    let five = saved(root, 5, 2, TOTAL);
    let six = saved(root, 6, 2, TOTAL);
    fs::remove_file(six.join("COMPLETE")).unwrap();
    fs::create_dir(root.join("update_9")).unwrap();
    fs::write(root.join("update_9/COMPLETE"), "").unwrap();
    let writing = begin(root, 7, 3).unwrap();
    write_shard(&writing, 0, 2, &content_of(7, owned(0, 2, TOTAL))).unwrap();
    fs::create_dir(root.join(".deleting-update_00000001")).unwrap();
    assert_eq!(newest(root).unwrap(), Some(Found { update: 5, path: five }));

    clear_unfinished(root).unwrap();
    assert!(!writing.exists() && !root.join(".deleting-update_00000001").exists());
    saved(root, 6, 2, TOTAL);
    assert_eq!(newest(root).unwrap().unwrap().update, 6);
    assert!(files(root).iter().all(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.')));
}

#[test]
fn an_earlier_life_cannot_write_into_this_one() {
    let dir = tempfile::tempdir().unwrap();
    let earlier = begin(dir.path(), 7, 1).unwrap();
    let now = begin(dir.path(), 7, 2).unwrap();
    let error = write_shard(&earlier, 1, 2, &content(7, 0..4)).unwrap_err().to_string();
    assert!(error.contains("all nodes share"), "{error}");
    assert!(files(&now).is_empty());
}

#[test]
fn saving_an_update_again_replaces_it() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path(), 5, 2, TOTAL);
    let path = saved(dir.path(), 5, 4, TOTAL);
    assert_eq!(open(&path).unwrap().manifest().world_size, 4);
    open(&path).unwrap().verify().unwrap();
    assert_eq!(files(dir.path()), std::slice::from_ref(&path));

    // Killed between the two renames: the one set aside counts, and is put back.
    let aside = dir.path().join(".replaced-update_00000005-7");
    fs::rename(&path, &aside).unwrap();
    assert_eq!(newest(dir.path()).unwrap().unwrap().path, aside);
    open(&aside).unwrap().verify().unwrap();
    clear_unfinished(dir.path()).unwrap();
    assert_eq!(list(dir.path()).unwrap(), [Found { update: 5, path }]);
}

#[cfg(target_os = "linux")]
/// Rank 2's disk is full: the same error on all ranks, nothing that looks complete, the earlier one good.
#[test]
fn a_failure_on_one_rank_is_an_error_on_all() {
    let dir = tempfile::tempdir().unwrap();
    let five = saved(dir.path(), 5, 4, TOTAL);
    let full: fn(&Path) = |root| {
        let shard = root.join(".writing-update_00000006-7/shard-00002-of-00004.safetensors");
        std::os::unix::fs::symlink("/dev/full", shard).unwrap();
    };
    // Just before its second gather rank 2 knows that all have begun, but rank 0 has made the folder already.
    let results = save_with(dir.path(), 6, 4, TOTAL, Some((2, 1, full)));
    let errors: Vec<String> = results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    assert!(errors[0].contains("rank 2 on ") && errors[0].contains("No space left"), "{}", errors[0]);
    assert!(errors[0].contains("untouched"), "{}", errors[0]);
    assert!(!errors[0].contains('\n'));
    assert_eq!(files(dir.path()), std::slice::from_ref(&five));
    open(&five).unwrap().verify().unwrap();
    saved(dir.path(), 6, 4, TOTAL);
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_on_all() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    for result in save_with(&dir.path().join("file/checkpoints"), 1, 3, TOTAL, None) {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("rank 0 on ") && error.contains("Not a directory"), "{error}");
    }
    // /sys takes no folders, from root neither.
    for result in save_with(Path::new("/sys/checkpoints"), 1, 2, TOTAL, None) {
        assert!(result.unwrap_err().to_string().contains("/sys/checkpoints"));
    }
}

#[test]
fn shards_that_do_not_make_a_whole_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let gap = save(dir.path(), &state(1), &identity(TOTAL), &content(1, 1..TOTAL), &Solo, 1).unwrap_err();
    assert!(gap.to_string().contains("must begin at 0"), "{gap}");
    let short = save(dir.path(), &state(1), &identity(TOTAL), &content(1, 0..TOTAL - 1), &Solo, 1).unwrap_err();
    assert!(short.to_string().contains("1002") && short.to_string().contains("1003"), "{short}");
    let wrong = Shard { ranges: content(1, 0..TOTAL).ranges, ..content(1, 0..4) };
    let wrong = save(dir.path(), &state(1), &identity(TOTAL), &wrong, &Solo, 1).unwrap_err();
    assert!(wrong.to_string().contains("has 4 elements"), "{wrong}");
    assert_eq!(files(dir.path()), Vec::<PathBuf>::new());
}

#[test]
fn a_shard_that_shrinks_before_the_commit_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let writing = begin(dir.path(), 1, 1).unwrap();
    let entry = write_shard(&writing, 0, 1, &content(1, 0..TOTAL)).unwrap();
    fs::write(writing.join(&entry.file), "short").unwrap();
    let error = commit(dir.path(), &state(1), &identity(TOTAL), vec![entry], 1).unwrap_err().to_string();
    assert!(error.contains("has 5 bytes"), "{error}");
    assert_eq!(newest(dir.path()).unwrap(), None);
}

#[test]
fn find_says_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let (out, root) = (dir.path(), dir.path().join("checkpoints"));
    let from = |path: &Path| find(&Resume::From(path.into()), &root).map_err(|e| e.to_string());
    assert_eq!(find(&Resume::Auto, &root).unwrap(), None);
    assert!(from(&out.join("nowhere")).unwrap_err().contains("there is nothing at this path"));
    assert!(from(out).unwrap_err().contains("neither a checkpoint nor a run folder"));
    fs::create_dir(&root).unwrap();
    for path in [out, &root] {
        assert!(from(path).unwrap_err().contains("no complete checkpoint in this run"));
    }

    let (five, six) = (saved(&root, 5, 2, 10), saved(&root, 6, 2, 10));
    assert_eq!(find(&Resume::Never, &root).unwrap(), None);
    assert_eq!(find(&Resume::Auto, &root).unwrap().as_ref(), Some(&six));
    for path in [out, &root, &six] {
        assert_eq!(from(path).unwrap().as_ref(), Some(&six));
    }
    assert_eq!(from(&five).unwrap().as_ref(), Some(&five));
    fs::remove_file(six.join("COMPLETE")).unwrap();
    let error = from(&six).unwrap_err();
    assert!(error.contains("no file COMPLETE") && error.contains("update_00000005"), "{error}");
    let error = from(&five.join("manifest.json")).unwrap_err();
    assert!(error.contains("neither"), "{error}");

    assert_eq!("auto".parse::<Resume>().unwrap(), Resume::Auto);
    assert_eq!("never".parse::<Resume>().unwrap(), Resume::Never);
    assert_eq!("runs/a".parse::<Resume>().unwrap(), Resume::From("runs/a".into()));
    assert!("".parse::<Resume>().is_err());
}

#[test]
fn the_description_says_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = saved(dir.path(), 5, 4, TOTAL);
    let description = describe(&path).unwrap();
    let table = description.to_string();
    for wanted in ["update       5", "1003", "4 ranks", "shard-00003-of-00004.safetensors", "250 in 2 ranges", "policy"]
    {
        assert!(table.contains(wanted), "{wanted} is not in\n{table}");
    }
    let json = serde_json::to_value(&description).unwrap();
    assert_eq!(json["state"]["update"], 5);
    assert_eq!(json["shards"][3]["ranges"][1]["end"], TOTAL);
    assert_eq!(json["vectors"].as_array().unwrap().len(), 5);
}

/// Resuming is exact only if the numbers in `extra` are.
#[test]
fn numbers_of_the_state_come_back_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let mut bits = 0x9E37_79B9_7F4A_7C15u64;
    let numbers: Vec<f64> = std::iter::repeat_with(|| {
        bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f64::from_bits(bits)
    })
    .filter(|x| x.is_finite())
    .take(2000)
    .collect();
    let state = TrainState { update: 1, iteration: u64::MAX, extra: serde_json::json!(numbers) };
    let path = save(dir.path(), &state, &identity(TOTAL), &content(1, 0..TOTAL), &Solo, 1).unwrap();
    assert!(*open(&path).unwrap().state() == state, "a number has changed on its way through JSON");
}
