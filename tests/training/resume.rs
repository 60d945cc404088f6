//! A run that was stopped and started again ends as the unbroken one.

use crate::common::Job;
use crate::runs::{Record, TIMEOUT, Training, UPDATES, alone, unbroken};

/// Stopped in the middle on some ranks, then ended on others.
fn resumed(stopped: &Training, ranks: usize) -> Record {
    let training = stopped.copy();
    training.run(ranks, UPDATES);
    training.record()
}

fn stopped(ranks: usize) -> Training {
    let training = Training::new(&[]);
    training.run(ranks, UPDATES / 2);
    assert_eq!(training.saved(), Some(UPDATES / 2));
    training
}

#[test]
fn a_stopped_run_ends_as_the_unbroken_one() {
    let _alone = alone();
    let stopped = stopped(2);
    resumed(&stopped, 2).assert_equal(&unbroken(2));
    resumed(&stopped, 1).assert_close(&unbroken(2), "2 ranks, then 1");
}

#[test]
fn so_does_a_run_of_one_rank() {
    let _alone = alone();
    let stopped = stopped(1);
    let training = stopped.copy();
    for _ in 0..2 {
        // The second time there is nothing left to do.
        training.run(1, UPDATES);
        training.record().assert_equal(&unbroken(1));
    }
    resumed(&stopped, 4).assert_close(&unbroken(1), "1 rank, then 4");
}

/// Each life shares out something else, on another number of ranks: every pair of ways, both ways round.
#[test]
fn so_does_a_run_that_shares_out_something_else_in_each_life() {
    let _alone = alone();
    let there = [(2, "none"), (1, "full"), (4, "optimizer"), (2, "none")];
    let back = [(4, "optimizer"), (2, "full"), (1, "none"), (4, "optimizer")];
    for lives in [there, back] {
        let training = Training::new(&[]);
        for (update, (ranks, shard)) in (1..).zip(lives) {
            let shard = format!("parallel.shard={shard}");
            Job::start(training.command(ranks, update).args(["--set", &shard])).finish(TIMEOUT).success();
            assert_eq!(training.saved(), Some(update), "{ranks} ranks, {shard}");
        }
        training.record().assert_close(&unbroken(2), &format!("{lives:?}"));
    }
}

#[test]
fn what_changed_is_named_and_a_run_that_is_done_keeps_its_configuration() {
    let _alone = alone();
    let training = Training::new(&["run.eval_every=0"]);
    training.run(1, 2);
    let config = || std::fs::read_to_string(training.path("config.toml")).unwrap();
    let written = config();
    let changed = |updates| {
        let mut command = training.command(1, updates);
        let output = Job::start(command.args(["--set", "optim.lr=0.001"])).finish(TIMEOUT).success();
        let line = output.stderr.lines().find(|line| line.contains("the configuration has changed since")).unwrap();
        assert!(line.contains("since: optim.lr 0.") && line.ends_with(" -> 0.001"), "{line}");
    };
    changed(1);
    assert_eq!(config(), written, "nothing was trained");
    changed(3);
    assert!(config().contains("lr = 0.001\n") && config().contains("updates = 3\n"), "{}", config());
}
