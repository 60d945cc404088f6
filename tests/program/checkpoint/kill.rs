//! Killed at any instant, a run leaves its newest complete checkpoint whole.

use super::ranks::{content, read, saved};
use crate::common::test_of;
use flowrl_dist::checkpoint::{newest, open, prune};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const FOLDER: &str = "FLOWRL_TEST_SAVES_UNTIL_KILLED";
const KILLS: u32 = 20;
const TOTAL: usize = 20_011;

/// The child of the test below; alone it does nothing.
#[test]
fn saves_until_killed() {
    let Some(root) = std::env::var_os(FOLDER) else { return };
    let root = Path::new(&root);
    let mut update = newest(root).unwrap().map_or(0, |found| found.update);
    loop {
        // Every third save is of an update that is there already.
        update += u64::from(update == 0 || rand(3) != 0);
        saved(root, update, 2, TOTAL);
        prune(root, 2, None).unwrap();
    }
}

#[test]
fn a_kill_at_any_instant_leaves_the_newest_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (mut last, mut cut_short) = (0, 0);
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &test_of(module_path!(), "saves_until_killed")])
            .env(FOLDER, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Not before it saves, then at a random instant of the following saves.
        let began = Instant::now();
        while newest(dir.path()).unwrap().is_none_or(|found| found.update <= last) {
            assert!(began.elapsed() < Duration::from_secs(60), "the child does not save");
            assert!(child.try_wait().unwrap().is_none(), "the child ended by itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(rand(40_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        cut_short += u32::from(leftovers(dir.path()));

        let found = newest(dir.path()).unwrap().expect("there is one from the first kill on");
        assert!(found.update > last, "kill {kill}: update {} after {last}", found.update);
        last = found.update;
        let reader = open(&found.path).unwrap();
        reader.verify().unwrap();
        assert_eq!(read(&reader, 0..TOTAL).unwrap(), content(last, 0..TOTAL), "kill {kill}");
    }
    assert!(cut_short > 0, "no kill has hit a save: the test proves nothing");
}

fn leftovers(root: &Path) -> bool {
    std::fs::read_dir(root).unwrap().any(|entry| entry.unwrap().file_name().to_str().unwrap().starts_with('.'))
}

/// A number below `limit`, from the clock.
fn rand(limit: u64) -> u64 {
    let nanos = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    nanos.wrapping_mul(6_364_136_223_846_793_005).rotate_left(31) % limit
}
