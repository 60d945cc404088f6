//! Runs whose iterations go wrong: what is left out is counted for good, and a replica that differs ends the run.

use super::*;
use crate::checkpoint::{self, Resume};
use crate::comm::ThreadGroup;
use crate::interrupt::Interrupt;
use crate::train::own::Own;
use crate::train::tests::{By, bits, flip, small};
use crate::train::{resume, start as starting};
use std::cell::Cell;

const RANKS: usize = 2;

/// A run of 2 x 3 images in a folder.
fn config(folder: &tempfile::TempDir, settings: &[&str]) -> Result<RunConfig> {
    let mut config = small(settings)?;
    config.run.out = folder.path().to_path_buf();
    Ok(config)
}

/// The run begins, whatever signals come.
fn start<'a>(config: &'a RunConfig, resume: &Resume, world: &World) -> Result<Run<'a>> {
    let begin = resume::begin(config, resume, &Interrupt::default(), world)?.expect("no signal");
    starting::start(config, Own::default(), begin, Vec::new(), Outlook::new(world.rank() == 0), world)
}

/// The updates' lines of the log: update, iteration and what was left out until then.
fn logged(folder: &tempfile::TempDir) -> Vec<[f64; 3]> {
    let text = std::fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.map(|line| ["update", "iteration", "skipped"].map(|name| line[name].as_f64().unwrap())).collect()
}

#[test]
fn what_is_not_finite_is_left_out_and_counted_over_lives() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, &["optim.not_finite=skip"])?;
    ThreadGroup::run(RANKS, |world| {
        let mut run = start(&config, &Resume::Never, &world)?;
        let before = bits(&run.trainer)?;
        for (bad, count) in [(By::NAN, 1), (By::HUGE, 2)] {
            run.trainer.score_by(if world.rank() == 1 { bad } else { By::MEAN }.alone())?;
            run.iteration()?;
            assert_eq!((run.trainer.state.update, run.iteration, run.trainer.skipped), (0, count, count));
            assert!(bits(&run.trainer)? == before, "the weights were touched");
        }
        run.trainer.score_by(By::MEAN.alone())?;
        run.iteration()?;
        assert_eq!((run.trainer.state.update, run.fruitless), (1, 0));
        run.save()?;
        run.checkpoints.finish(&*world.host)
    })?;
    ThreadGroup::run(RANKS, |world| {
        let mut run = start(&config, &Resume::Auto, &world)?;
        assert_eq!((run.trainer.state.update, run.iteration, run.trainer.skipped), (1, 3, 2));
        for reward in [By::NAN, By::MEAN] {
            run.trainer.score_by(reward.alone())?;
            run.iteration()?;
        }
        Ok(())
    })?;
    assert_eq!(logged(&folder), [[1.0, 2.0, 2.0], [2.0, 4.0, 3.0]]);
    Ok(())
}

#[test]
fn a_reward_that_is_not_finite_ends_a_run_that_shall_stop() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, &["optim.not_finite=stop"])?;
    let messages = ThreadGroup::run(RANKS, |world| {
        let mut run = start(&config, &Resume::Never, &world)?;
        let before = bits(&run.trainer)?;
        let mut messages = Vec::new();
        for bad in [By::NAN, By::HUGE] {
            run.trainer.score_by(if world.rank() == 1 { bad } else { By::MEAN }.alone())?;
            let error = run.iteration().expect_err("a number is not finite");
            assert!(matches!(error, Error::NotFinite(_)), "{error}");
            assert!(bits(&run.trainer)? == before, "the weights were touched");
            messages.push(error.to_string());
        }
        Ok(messages)
    })?;
    assert_eq!(messages[0], messages[1]);
    Ok(())
}

#[test]
fn a_run_that_leaves_everything_out_ends() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, &["optim.not_finite=skip"])?;
    ThreadGroup::run(RANKS, |world| {
        let mut run = start(&config, &Resume::Never, &world)?;
        run.trainer.score_by(By::NAN.alone())?;
        for _ in 1..MOST_FRUITLESS {
            run.iteration()?;
        }
        let error = run.iteration().expect_err("nothing was trained").to_string();
        assert!(error.contains("iterations in a row were left out"), "{error}");
        assert_eq!((run.trainer.state.update, run.trainer.skipped), (0, MOST_FRUITLESS));
        Ok(())
    })?;
    Ok(())
}

/// Where every rank takes all of every step, a fault stays; where state is shared out, the next update brings the same
/// parameters to all.
#[test]
fn a_replica_that_differs_ends_the_run_within_a_period() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, &["parallel.shard=none", "parallel.check_every=3"])?;
    ThreadGroup::run(RANKS, |world| {
        let mut run = start(&config, &Resume::Never, &world)?;
        run.trainer.score_by(By::MEAN.alone())?;
        run.iteration()?;
        if world.rank() == 1 {
            flip(&run.trainer.state.policy()?, 12345, 20)?;
        }
        run.iteration()?;
        let error = run.iteration().expect_err("rank 1 differs");
        assert!(error.to_string().starts_with("update 3: the parameters of rank 1 differ from rank 0's"), "{error}");
        let error = run.ended_by(error);
        assert!(matches!(error, Error::Failed(_)), "{error}");
        assert!(checkpoint::newest(&checkpoint::root(&config.run.out))?.is_none(), "a fault is not saved");
        Ok(())
    })?;
    Ok(())
}

/// Metrics, events and pictures are nothing that a run depends on until its end, when what is missing is told.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_takes_no_metrics_does_not_end_a_run_before_its_end() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, &["run.updates=2", "run.checkpoint_every=1", "eval.prompts=1", "eval.steps=2"])?;
    ThreadGroup::run(RANKS, |world| {
        let mut run = start(&config, &Resume::Never, &world)?;
        if world.rank() == 0 {
            std::fs::remove_file(folder.path().join("metrics.jsonl")).unwrap();
            std::os::unix::fs::symlink("/dev/full", folder.path().join("metrics.jsonl")).unwrap();
            std::fs::write(folder.path().join("samples"), "no folder").unwrap();
        }
        assert!(!run.until_done(&|_| Ok(false))?);
        assert_eq!(checkpoint::newest(&checkpoint::root(&config.run.out))?.map(|found| found.update), Some(1));
        match run.finish() {
            Ok(_) => assert_eq!(world.rank(), 1),
            Err(e) => assert!(
                world.rank() == 0 && e.to_string().contains("metrics.jsonl: is a pipe, a socket or a device"),
                "{e}"
            ),
        }
        assert_eq!(checkpoint::newest(&checkpoint::root(&config.run.out))?.map(|found| found.update), Some(2));
        Ok(())
    })?;
    // What is in the way at the start is told at the start.
    std::fs::remove_dir_all(checkpoint::root(&config.run.out)).unwrap();
    ThreadGroup::run(1, |world| {
        for name in ["samples", "metrics.jsonl"] {
            let error = start(&config, &Resume::Never, &world).err().unwrap();
            assert!(error.exit_code() == 2 && error.to_string().contains(&format!("{name}: is ")), "{error}");
            std::fs::remove_file(folder.path().join(name)).unwrap();
        }
        start(&config, &Resume::Never, &world).map(drop)
    })
    .map(drop)
}

#[test]
fn the_gallery_is_the_same_on_any_number_of_ranks_and_for_every_seed_of_the_run() -> Result<()> {
    let settings = [(1, "run.seed=1"), (3, "run.seed=2"), (1, "eval.seed=7")];
    let galleries = settings.map(|(ranks, seed)| {
        let folder = tempfile::tempdir().unwrap();
        let config = config(&folder, &["eval.steps=2", seed])?;
        let galleries = ThreadGroup::run(ranks, |world| {
            let run = start(&config, &Resume::Never, &world)?;
            let (_, Gallery { images, captions }) =
                run.sampled(&*run.trainer.policies.reference, 4, &Rewards::default())?;
            Ok((images.flatten_all()?.to_vec1::<f32>()?, captions))
        })?;
        assert!(galleries.iter().all(|gallery| *gallery == galleries[0]));
        assert!(galleries[0].0.chunks(galleries[0].0.len() / 4).all(|image| image.iter().any(|&pixel| pixel > 0.0)));
        Ok(galleries[0].clone())
    });
    let [one, three, other] = galleries.map(Result::unwrap);
    assert_eq!(one.1.len(), 4);
    assert!(one == three, "the same pictures and captions");
    assert!(one.0 != other.0, "other noise, other pictures");
    Ok(())
}

/// The window of the rollouts is none of an evaluation's whose solver takes no stochastic steps.
#[test]
fn an_evaluation_may_have_fewer_steps_than_the_rollouts_have_stochastic_ones() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let settings = ["sampler.sde.window=4", "sampler.steps=5", "eval.steps=3", "eval.prompts=1"];
    let config = config(&folder, &settings)?;
    ThreadGroup::run(1, |world| start(&config, &Resume::Never, &world)?.evaluate())?;
    Ok(())
}

/// Asked after an iteration it saves without the evaluation that is due, which the next life makes up for; asked after an
/// evaluation it does not train on.
#[test]
fn a_run_that_is_asked_to_leave_saves_at_once_and_misses_no_evaluation() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let settings = ["run.updates=3", "run.eval_every=1", "run.checkpoint_every=0", "eval.prompts=2", "eval.steps=2"];
    let config = config(&folder, &settings)?;
    // Asked at first, then after each evaluation and each iteration.
    let lives: [(usize, (bool, u64), &[u64]); 6] = [
        (1, (true, 0), &[]),
        (2, (true, 0), &[0]),
        (2, (true, 1), &[0]),
        (3, (true, 2), &[0, 1]),
        (4, (true, 3), &[0, 1, 2, 3]),
        (0, (false, 3), &[0, 1, 2, 3]),
    ];
    for (leave_at, outcome, evaluated) in lives {
        let outcomes = ThreadGroup::run(RANKS, |world| {
            let mut run = start(&config, &Resume::Auto, &world)?;
            let asked = Cell::new(0);
            let left = run.until_done(&|_| Ok(asked.replace(asked.get() + 1) + 1 == leave_at))?;
            Ok((left, run.trainer.state.update))
        })?;
        assert_eq!(outcomes, [outcome; RANKS]);
        let text = std::fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let evaluations = lines.filter(|line| line["eval.images"].is_number());
        assert_eq!(evaluations.map(|line| line["update"].as_u64().unwrap()).collect::<Vec<_>>(), evaluated);
        if outcome.0 {
            let newest = checkpoint::newest(&checkpoint::root(&config.run.out))?.expect("a checkpoint");
            assert_eq!(newest.update, outcome.1);
        }
    }
    Ok(())
}

#[test]
fn the_report_is_there_after_an_evaluation() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, &["eval.prompts=2", "eval.steps=1"])?;
    ThreadGroup::run(RANKS, |world| {
        let mut run = start(&config, &Resume::Never, &world)?;
        run.evaluate()?;
        world.host.barrier()?; // rank 0 writes it
        let page = std::fs::read_to_string(folder.path().join(report::FILE)).map_err(Error::io(report::FILE))?;
        assert!(page.contains("Held-out evaluation") && page.contains("data:image/png"), "{page}");
        assert!(run.state().best.is_some());
        Ok(())
    })?;
    Ok(())
}
