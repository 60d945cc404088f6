//! Checkpoints: whole or not there, at any number of ranks, and every damage found.

mod damage;
mod kill;
mod ranks;
mod saving;

use flowrl_dist::checkpoint::{
    Found, Resume, Shard, TrainState, begin, clear_unfinished, commit, describe, find, list, newest, open, write_shard,
};
use flowrl_dist::comm::Solo;
use flowrl_dist::digest;
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

    // Text encoders and decoder: refused by name where both are known, which those of an earlier checkpoint are not.
    let mut other = ours.clone();
    other.parts.insert("vae".into(), digest::of(b"other"));
    let error = reader.check_identity(&other, &[]).unwrap_err();
    let wanted = format!("was trained with another vae than this run's (digest {}, now", &ours.parts["vae"][..12]);
    assert!(error.exit_code() == 2 && error.to_string().contains(&wanted), "{error}");
    other.parts.clear();
    assert_eq!(reader.check_identity(&other, &[]).unwrap(), Vec::<String>::new());

    let mut other = ours.clone();
    (other.config_digest, other.seed) = (digest::of(b"other config"), 43);
    let warnings = reader.check_identity(&other, &[]).unwrap();
    assert_eq!(warnings.len(), 2);
    let now = format!("now {})", digest::of(b"other config").split_at(12).0);
    assert!(warnings[0].ends_with(&now) && warnings[1].contains("43"), "{warnings:?}");
    let changes = ["optim.lr 0.1 -> 0.2", "batch.prompts 1 -> 2"].map(String::from);
    let warnings = reader.check_identity(&other, &changes).unwrap();
    assert!(warnings[0].ends_with("changed since: optim.lr 0.1 -> 0.2, batch.prompts 1 -> 2"), "{warnings:?}");

    // A digest of another form says nothing; what has changed key by key does.
    let mut other = ours.clone();
    other.config_digest = format!("{}:effective", digest::of(b"config"));
    assert!(reader.check_identity(&other, &[]).unwrap().is_empty());
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
