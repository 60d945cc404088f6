//! Checkpoints are written beside training, and a folder that cannot be written does not end it before its end.

use crate::common::Job;
use crate::runs::{TIMEOUT, Training, UPDATES, alone, unbroken};
use flowrl_dist::error::EXIT_FAILED;
use std::fs;

const EVERY: [&str; 1] = ["run.checkpoint_every=1"];

/// Puts a file in the place of the folder of checkpoints, which is set aside: nothing can be saved, from root neither.
fn obstruct(training: &Training) {
    fs::rename(training.path("checkpoints"), training.path("aside")).unwrap();
    fs::write(training.path("checkpoints"), "").unwrap();
}

fn clear(training: &Training) {
    fs::remove_file(training.path("checkpoints")).unwrap();
    fs::rename(training.path("aside"), training.path("checkpoints")).unwrap();
}

#[test]
fn a_run_that_cannot_save_for_a_while_goes_on() {
    let _alone = alone();
    let unbroken = unbroken(2);
    let training = Training::new(&EVERY);
    let mut job = Job::start(&mut training.command(2, UPDATES));
    job.until("the first checkpoint", TIMEOUT, || training.saved() >= Some(1));
    obstruct(&training);
    job.until("a refused save", TIMEOUT, || job_log(&training).contains("training goes on"));
    clear(&training);
    let output = job.finish(TIMEOUT).success();
    assert!(output.stderr.contains("not saved: rank 0 on "), "{output}");
    training.record().assert_equal(&unbroken);
}

#[test]
fn a_run_that_cannot_save_at_its_end_fails_and_loses_nothing_older() {
    let _alone = alone();
    let training = Training::new(&EVERY);
    let mut job = Job::start(&mut training.command(2, UPDATES));
    job.until("the first checkpoint", TIMEOUT, || training.saved() >= Some(1));
    obstruct(&training);
    let output = job.finish(TIMEOUT);
    assert_eq!(output.code(), EXIT_FAILED, "{output}");
    assert!(training.logged(UPDATES), "training went on to its end");
    assert!(output.stderr.contains(&format!("update_{UPDATES:08}: not saved: rank 0 on ")), "{output}");
    clear(&training);
    let saved = training.saved().unwrap();
    assert!((1..UPDATES).contains(&saved));
    training.run(2, UPDATES);
    training.record().assert_equal(&unbroken(2));
}

/// What rank 0 has logged so far.
fn job_log(training: &Training) -> String {
    let logs = fs::read_dir(training.path("logs")).into_iter().flatten().flatten();
    logs.filter_map(|entry| fs::read_to_string(entry.path()).ok()).collect()
}
