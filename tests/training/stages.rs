//! Runs whose weights and prompts change on the way.

use crate::common::Job;
use crate::runs::{Record, TIMEOUT, Training, UPDATES, alone, finished};
use flowrl_dist::checkpoint;
use flowrl_dist::error::EXIT_USAGE;
use serde_json::{Value, json};

const REWARDS: &str =
    "reward=[{name=\"ocr\"}, {name=\"colour\", weight=0.0}, {name=\"jpeg-compressibility\", weight=0.0}]";
/// A change of weights, of both, and of both again, where the first prompts come back.
const STAGES: &str = "stage=[{at_update=1, weights={colour=0.5}}, {at_update=2, weights={ocr=0.0}, train=\"glyphs-4\"}, \
                      {at_update=3, weights={ocr=1.0}, train=\"glyphs\"}]";
const OFTEN: &str = "run.eval_every=1";

/// The lines of updates, or those of evaluations.
fn lines<'a>(record: &'a Record, key: &str) -> Vec<&'a Value> {
    record.metrics.iter().filter(|line| line[key].is_number()).collect()
}

#[test]
fn weights_and_prompts_change_when_they_are_due_and_every_reward_is_always_reported() {
    let _alone = alone();
    let training = Training::new(&[REWARDS, STAGES, OFTEN]);
    let output = training.run(2, UPDATES);
    for line in [
        "stage 0 from update 0 on: colour 0, jpeg-compressibility 0, ocr 1; glyphs\n",
        "stage 2 from update 2 on: colour 0.5, jpeg-compressibility 0, ocr 0; glyphs-4\n",
    ] {
        assert_eq!(output.stderr.matches(line).count(), 1, "{line}{output}");
    }
    let (staged, plain) = (training.record(), finished(&[REWARDS, OFTEN], 2));

    let updates = lines(&staged, "iteration");
    assert_eq!(updates.iter().map(|line| line["stage"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let evaluations = lines(&staged, "eval.images");
    assert_eq!(evaluations.len(), 1 + 4);
    for reward in ["ocr", "colour", "jpeg-compressibility"] {
        let mean = format!("reward.{reward}.mean");
        assert!(updates.iter().all(|line| line[&mean].is_number()));
        assert!(evaluations.iter().all(|line| line[&format!("eval.{mean}")].is_number()));
    }

    // Before the first stage the run without any is the same; a change of weights shows in the advantages alone, until
    // the next rollout; other prompts show in the rewards.
    let without = lines(&plain, "iteration");
    let equal = |i: usize, key: &str| updates[i][key] == without[i][key];
    assert!(["loss", "grad_norm", "advantage.rms", "reward.ocr.mean"].iter().all(|key| equal(0, key)));
    assert!(equal(1, "reward.ocr.mean") && equal(1, "reward.jpeg-compressibility.mean"));
    assert!(!equal(1, "advantage.rms") && !equal(1, "loss"));
    assert!(!equal(2, "reward.ocr.mean") && !equal(2, "reward.jpeg-compressibility.mean"));
    assert!(without[0].get("stage").is_none());
}

#[test]
fn a_run_that_is_stopped_at_every_change_ends_as_the_unbroken_one() {
    let _alone = alone();
    let settings = [REWARDS, STAGES, OFTEN];
    let unbroken = finished(&settings, 2);
    let training = Training::new(&settings);
    training.run(2, 1);
    let elsewhere = training.copy();
    (2..=UPDATES).for_each(|update| drop(training.run(2, update)));
    training.record().assert_equal(&unbroken);
    elsewhere.run(1, UPDATES);
    elsewhere.record().assert_close(&unbroken, "2 ranks, then 1");
    // The last evaluation tells the same on any number of ranks: what they read, not the last bits of a picture.
    let last = |record: &Record| lines(record, "eval.images").last().unwrap()["eval.reward.ocr.mean"].clone();
    assert_eq!(last(&elsewhere.record()), last(&unbroken));
}

#[test]
fn what_has_begun_cannot_be_changed_and_what_comes_can() {
    let _alone = alone();
    let training = Training::new(&[REWARDS, STAGES, OFTEN]);
    training.run(1, 2);
    let newest = checkpoint::newest(&training.path("checkpoints")).unwrap().unwrap();
    let stages = checkpoint::open(&newest.path).unwrap().state().extra["stages"].clone();
    let weights = json!({ "colour": 0.5, "jpeg-compressibility": 0.0, "ocr": 1.0 });
    let second =
        json!({ "number": 1, "at_update": 1, "weights": weights, "train": "glyphs", "prompts_of": 0, "iteration": 1 });
    assert_eq!((stages.as_array().unwrap().len(), &stages[1]), (2, &second));

    let resumed = |stages: &str| {
        let copy = training.copy();
        Job::start(copy.command(1, 3).args(["--set", stages])).finish(TIMEOUT)
    };
    for (stages, words) in [
        (
            "stage=[{at_update=1, weights={colour=0.25}}]",
            "colour 0.5, jpeg-compressibility 0, ocr 1; glyphs, and this run",
        ),
        (
            "stage=[]",
            "which this run lacks; what a stage did cannot be changed later: put it back, or pass another --out",
        ),
    ] {
        let output = resumed(stages);
        assert_eq!(output.code(), EXIT_USAGE, "{output}");
        let line = output.stderr.lines().last().unwrap();
        assert!(line.contains("went through stage 1 from update 1 on: ") && line.contains(words), "{output}");
    }
    let output = resumed("stage=[{at_update=1, weights={colour=0.5}}, {at_update=2, weights={colour=-1.0}}]").success();
    assert!(output.stderr.contains("stage 2 from update 2 on: colour -1, jpeg-compressibility 0, ocr 1; glyphs\n"));
}
