//! A run that was stopped and started again ends as the unbroken one.

use crate::common::Job;
use crate::runs::{Record, TIMEOUT, Training, UPDATES, alone, finished, unbroken};

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

/// Adapters in bf16, two updates an iteration, whose rollouts' stochastic steps move on with it.
#[test]
fn so_does_a_run_of_adapters_on_moving_rollout_steps() {
    let _alone = alone();
    let settings = [
        "model.trainable=lora",
        "model.dtype=bf16",
        "method.name=flow-grpo",
        "batch.updates_per_iteration=2",
        "sampler.solver=sde",
        "sampler.sde.window=2",
        "sampler.sde.move_every=1",
        "old_policy.rate=0.2",
    ];
    let unbroken = finished(&settings, 2);
    let training = Training::new(&settings);
    training.run(2, UPDATES / 2);
    assert_eq!(training.saved(), Some(UPDATES / 2));
    training.run(2, UPDATES);
    training.record().assert_equal(&unbroken);
}

#[test]
fn prompts_that_changed_under_their_name_are_told() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mine.txt");
    let write = |number: u64| std::fs::write(&file, format!("\"{number}\" in red on yellow\n").repeat(4)).unwrap();
    let training = Training::new(&["run.eval_every=0", &format!("data.train={}", file.display())]);
    let told = |updates| training.run(1, updates).stderr.matches("held other prompts").count();
    write(417);
    assert_eq!((told(1), told(2)), (0, 0));
    write(418);
    assert_eq!(told(3), 1);
    assert_eq!(told(4), 0, "the checkpoint has the new ones");
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
