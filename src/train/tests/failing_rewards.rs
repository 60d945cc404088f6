//! Rewards that fail, on one rank or for one image: what becomes of the others.

use super::*;
use crate::advantage::Score;
use crate::comm::ThreadGroup;
use crate::reward::{Reward, ScoreResult};
use candle_core::Device;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// Scores by the picture's mean, but the images of its list, counted from its first one; with `GONE` in the list it fails at
/// its second call.
struct Failing {
    images: Vec<usize>,
    seen: AtomicUsize,
}

const GONE: usize = usize::MAX;

fn failing(images: &[usize]) -> Rewards {
    Arc::new([Box::new(Failing { images: images.to_vec(), seen: AtomicUsize::new(0) }) as _])
}

impl Reward for Failing {
    fn name(&self) -> &str {
        "failing"
    }

    fn score(&self, images: &Tensor, _: &[Prompt]) -> Result<Vec<Option<f64>>> {
        if self.images.contains(&GONE) && self.seen.load(SeqCst) > 0 {
            return Err(Error::Reward { name: "failing".into(), message: "http://nowhere: it is gone".into() });
        }
        let means = images.flatten_from(1)?.mean(1)?.to_vec1::<f32>()?;
        Ok(means.into_iter().map(|mean| Some(mean.into())).collect())
    }

    fn try_score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<ScoreResult> {
        let mut scores: Vec<Score> = self.score(images, prompts)?.into_iter().map(Score::from).collect();
        let before = self.seen.fetch_add(scores.len(), SeqCst);
        let failed = (0..scores.len()).filter(|image| self.images.contains(&(before + image)));
        failed.for_each(|image| scores[image] = Score::Failed);
        Ok(ScoreResult { scores, unavailable: false })
    }
}

#[test]
fn a_reward_that_fails_on_one_rank_stops_all() -> Result<()> {
    for overlap in ["on", "off"] {
        let errors = ThreadGroup::run(2, |world| {
            let settings = ["optim.not_finite=skip", &format!("parallel.reward_overlap={overlap}")];
            let (mut trainer, _) = trainer(&world, &settings)?;
            trainer.score_by(failing(if world.rank() == 1 { &[GONE] } else { &[] }))?;
            let error = trainer.iteration(0, &mut |_| ()).expect_err("a reward failed");
            assert!(matches!(error, Error::Reward { .. }), "{error}");
            assert_eq!(trainer.state.update, 0);
            Ok(error.to_string())
        })?;
        assert_eq!(errors, ["reward failing: http://nowhere: it is gone"; 2]);
    }
    Ok(())
}

/// Ranks 0 and 1 hold 3 images each: the two groups.
#[test]
fn an_image_without_a_score_takes_its_group_along_and_nothing_else() -> Result<()> {
    ThreadGroup::run(2, |world| {
        let (mut trainer, _) = trainer(&world, &[])?;
        trainer.score_by(failing(if world.rank() == 1 { &[2] } else { &[] }))?;
        let before = trainer.state.gather_policy(&*world.device)?.to_vec1::<f32>()?;
        let updates = trainer.iteration(0, &mut |_| ())?;
        assert_eq!((updates.len(), updates[0].get("dropped_groups")), (1, Some(1.0)));
        assert!(trainer.state.gather_policy(&*world.device)?.to_vec1::<f32>()? != before);
        trainer.check_replicas()?;

        trainer.score_by(failing(&[0]))?;
        let error = trainer.iteration(1, &mut |_| ()).expect_err("no group is left").to_string();
        assert!(error.starts_with("reward failing: no group of this iteration"), "{error}");
        Ok(())
    })?;
    Ok(())
}

/// The gradient without a group is, bit for bit, that of a run whose iterations have the other group only.
#[test]
fn a_dropped_group_counts_nowhere() -> Result<()> {
    let (mut trainer, _) = trainer(&World::solo(), &["batch.timesteps=2"])?;
    let requests = trainer.requests(0);
    let prompts: Vec<Prompt> = requests.iter().map(|r| r.prompt.clone()).collect();
    let Samples { x0, trajectory } = trainer.sampling(0).run(&requests, 6)?;
    let dropped = BTreeSet::from([prompts[0].index]);
    let rows: Vec<usize> = (0..6).filter(|&i| prompts[i].index != prompts[0].index).collect();
    assert_eq!(rows.len(), 3);
    let places = Tensor::new(rows.iter().map(|&i| i as u32).collect::<Vec<_>>(), &Device::Cpu)?;
    let alone = Rollouts {
        iteration: 0,
        requests: rows.iter().map(|&i| requests[i].clone()).collect(),
        x0: x0.index_select(&places, 0)?,
        trajectory: None,
        advantages: vec![0.5, -1.0, 0.5],
        dropped: BTreeSet::new(),
    };
    let advantages = [vec![9.0; 3], alone.advantages.clone()].concat();
    let all = Rollouts { iteration: 0, requests, x0, trajectory, advantages, dropped };

    let gradient = |trainer: &Trainer, rollouts: &Rollouts| -> Result<Vec<f32>> {
        Ok(trainer.gradients(0, rollouts)?.0.finish()?.to_vec1()?)
    };
    let without = gradient(&trainer, &all)?;
    trainer.batches.prompts = 1;
    assert!(without == gradient(&trainer, &alone)?);
    assert!(without.iter().any(|&value| value != 0.0));
    Ok(())
}
