//! Saving beside training, which checkpoints are kept, and lives that follow each other.

use super::ranks::{content, identity, read, save, saved, state};
use super::{TOTAL, files};
use flowrl_dist::checkpoint::{Saver, clear_unfinished, newest, open, prune, set_best};
use flowrl_dist::comm::Solo;
use std::fs;
use std::path::PathBuf;

#[test]
fn prune_keeps_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<_> = [100, 20, 3].map(|update| saved(dir.path(), update, 2, 10)).into();
    assert_eq!(prune(dir.path(), 3, None).unwrap(), Vec::<PathBuf>::new());
    assert_eq!(prune(dir.path(), 2, None).unwrap(), [paths[2].clone()]);
    assert_eq!(prune(dir.path(), 0, None).unwrap(), [paths[1].clone()]);
    assert_eq!(files(dir.path()), [paths[0].clone()]);
}

#[test]
fn the_best_outlives_newer_ones() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<_> = [1, 2, 3, 4].map(|update| saved(dir.path(), update, 1, 10)).into();
    set_best(dir.path(), 2).unwrap();
    assert_eq!(prune(dir.path(), 1, Some(2)).unwrap(), [paths[0].clone(), paths[2].clone()]);
    assert_eq!(fs::read_to_string(dir.path().join("BEST")).unwrap(), "update_00000002\n");
    assert_eq!(newest(dir.path()).unwrap().unwrap().update, 4);
    // What a kill between its two steps leaves is cleared by the next life.
    fs::write(dir.path().join(".writing-BEST"), "").unwrap();
    clear_unfinished(dir.path()).unwrap();
    assert!(!dir.path().join(".writing-BEST").exists());
}

/// The caller may go on, and change its state, while the shard is written; only then it is there, and once.
#[test]
fn a_save_goes_on_beside_its_caller() {
    let dir = tempfile::tempdir().unwrap();
    let mut saver = Saver::new(dir.path(), identity(TOTAL), 1);
    assert_eq!(saver.poll(&Solo).unwrap(), None);
    let mut shard = content(1, 0..TOTAL);
    saver.begin(&state(1), shard.clone(), &Solo).unwrap();
    shard.vectors.values_mut().flatten().for_each(|x| *x = f32::NAN);
    assert_eq!(newest(dir.path()).unwrap(), None, "not before all ranks agree");
    let saved = loop {
        match saver.poll(&Solo).unwrap() {
            Some(saved) => break saved,
            None => std::thread::yield_now(),
        }
    };
    assert_eq!((saved.state, newest(dir.path()).unwrap().unwrap().path), (state(1), saved.path.clone()));
    assert_eq!(read(&open(&saved.path).unwrap(), 0..TOTAL).unwrap(), content(1, 0..TOTAL));
    assert_eq!((saver.poll(&Solo).unwrap(), saver.finish(&Solo).unwrap()), (None, None));
}

/// A rank of an earlier life that still writes has no folder to write into, and no part in the new checkpoint.
#[test]
fn an_earlier_life_cannot_complete_a_checkpoint_of_this_one() {
    for _ in 0..20 {
        let dir = tempfile::tempdir().unwrap();
        let mut earlier = Saver::new(dir.path(), identity(TOTAL), 1);
        earlier.begin(&state(1), content(9, 0..TOTAL), &Solo).unwrap();
        let now = save(dir.path(), &state(1), &identity(TOTAL), &content(1, 0..TOTAL), &Solo, 2).unwrap();
        let late = earlier.finish(&Solo).unwrap_err();
        assert!(matches!(late, flowrl_dist::Error::NotSaved { .. }), "{late}");
        assert_eq!(read(&open(&now).unwrap(), 0..TOTAL).unwrap(), content(1, 0..TOTAL));
    }
}
