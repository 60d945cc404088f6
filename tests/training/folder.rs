//! Run folders that are removed, moved or emptied while a run writes into them.

use crate::common::Job;
use crate::runs::{TIMEOUT, Training, UPDATES, alone};
use flowrl_dist::error::{EXIT_FAILED, EXIT_RESTART};
use std::fs;
use std::path::PathBuf;

/// Names in a run folder that begin so, with their paths.
fn found(training: &Training, names: &[&str]) -> Vec<PathBuf> {
    let entries = fs::read_dir(training.path("")).unwrap().map(|entry| entry.unwrap());
    let wanted = entries.filter(|entry| names.iter().any(|name| entry.file_name().to_string_lossy().starts_with(name)));
    wanted.map(|entry| entry.path()).collect()
}

/// The run ends with the folder's name, makes nothing in its place, and goes on where it stood once it is moved back.
#[test]
fn a_run_whose_folder_is_moved_or_removed_stops_and_says_so() {
    let _alone = alone();
    for moved in [true, false] {
        let training = Training::new(&["run.checkpoint_every=1", "run.eval_every=0", "eval.prompts=1"]);
        let out = training.path("").components().collect::<PathBuf>(); // without a slash at its end
        let elsewhere = out.with_extension("moved");
        let mut job = Job::start(&mut training.command(2, 1000 * UPDATES));
        job.until("the first checkpoint", TIMEOUT, || training.saved() >= Some(1));
        fs::rename(&out, &elsewhere).unwrap();
        if !moved {
            while fs::remove_dir_all(&elsewhere).is_err() {} // something may be written into it meanwhile
        }
        let output = job.finish(TIMEOUT);
        assert_eq!(output.code(), EXIT_FAILED, "{output}");
        let said = format!("run folder {}: was removed or moved while this run wrote into it", out.display());
        assert_eq!(output.stderr.matches(&said).count(), 1, "{output}");
        assert!(!out.exists(), "something was written where the folder was: {output}");
        if moved {
            fs::rename(&elsewhere, &out).unwrap();
            let saved = training.saved().unwrap();
            training.run(2, saved + 1);
            assert_eq!(training.saved(), Some(saved + 1));
        } else {
            fs::create_dir(&out).unwrap();
        }
    }
}

/// What a person clears away is made anew, and said to be new where lines are missing from it.
#[test]
fn a_run_whose_folder_is_emptied_makes_all_of_it_anew() {
    let _alone = alone();
    const ALL: [&str; 7] =
        ["metrics.jsonl", "events.out", "logs", "samples", "report.html", "config.toml", "checkpoints"];
    let training = Training::new(&["run.checkpoint_every=1", "run.eval_every=1", "eval.prompts=1", "log.level=debug"]);
    let mut job = Job::start(&mut training.command(1, 1000 * UPDATES));
    job.until("the first checkpoint", TIMEOUT, || training.saved() >= Some(1));
    let all = found(&training, &ALL);
    assert_eq!(all.len(), ALL.len(), "{all:?}");
    let aside = tempfile::tempdir_in(training.path("..")).unwrap();
    for path in &all {
        fs::rename(path, aside.path().join(path.file_name().unwrap())).unwrap();
    }
    job.until("all of it", TIMEOUT, || found(&training, &ALL).len() == ALL.len() && training.saved().is_some());
    job.signal("TERM");
    let output = job.finish(TIMEOUT);
    assert_eq!(output.code(), EXIT_RESTART, "{output}");
    for name in ["metrics.jsonl: was removed or replaced", "events.out", "config.toml: was removed"] {
        assert!(output.stderr.contains(name), "no {name}: {output}");
    }
    let record = training.record();
    let updates: Vec<u64> = record.metrics.iter().filter_map(|line| line["update"].as_u64()).collect();
    assert!(!updates.contains(&0) && updates.last() == Some(&record.state.0), "{updates:?}");
    let events: u64 = found(&training, &["events.out"]).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    let log = fs::read_to_string(training.path("logs/rank_00000.log")).unwrap();
    assert!(events > 100 && log.contains(&format!("update {}:", record.state.0)), "{events}: {log}");
}
