//! Scoring beside sampling: that it is beside it, and that nothing else changes.

use super::*;
use crate::comm::ThreadGroup;
use crate::reward::{Reward, RewardConfig, RewardKind, build};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// What both threads have reached.
#[derive(Default)]
struct Seen {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Calls of the reward that have begun.
    calls: usize,
    /// Micro-batches that went to the decoder.
    decoded: usize,
    /// Whether the trainer waits for the scores.
    waits: bool,
}

impl Seen {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn wait_until(&self, what: &str, mut reached: impl FnMut(&State) -> bool) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(state, Duration::from_secs(60), |state| !reached(state));
        assert!(!waited.unwrap_or_else(PoisonError::into_inner).1.timed_out(), "waited too long until {what}");
    }
}

/// Whose first call lasts until the trainer has sampled everything.
struct Slow(Arc<Seen>);

impl Reward for Slow {
    fn name(&self) -> &str {
        "slow"
    }

    fn score(&self, images: &Tensor, _: &[Prompt]) -> Result<Vec<Option<f64>>> {
        self.0.change(|state| state.calls += 1);
        self.0.wait_until("all is sampled", |state| state.waits);
        let means = images.flatten_from(1)?.mean(1)?.to_vec1::<f32>()?;
        Ok(means.into_iter().map(|mean| Some(mean.into())).collect())
    }
}

/// The second micro-batch is not decoded before the first is being scored, and the first is not scored before all are
/// decoded: neither waits for the other.
#[test]
fn images_are_scored_while_the_next_ones_are_sampled() -> Result<()> {
    let seen = Arc::new(Seen::default());
    let (mut trainer, _) = trainer(&World::solo(), &["parallel.reward_overlap=on"])?;
    trainer.score_by(Arc::new([Box::new(Slow(seen.clone())) as _]))?;
    let updates = trainer.iteration(0, &mut |phase| match phase {
        "decode" => {
            seen.change(|state| state.decoded += 1);
            seen.wait_until("the first images are being scored", |state| state.decoded < 2 || state.calls > 0);
        }
        "reward" => seen.change(|state| state.waits = true),
        _ => (),
    })?;
    let seconds = |name: &str| updates[0].get(name).expect("a time");
    assert!(seconds("time.reward_busy") > 0.0 && seconds("time.reward") > 0.0);
    let state = seen.state.lock().unwrap_or_else(PoisonError::into_inner);
    assert_eq!((state.decoded, state.calls), (3, 3), "6 images in micro-batches of 2");
    Ok(())
}

/// Every metric but the times, and every bit of the state.
type Record = (Vec<BTreeMap<String, u64>>, Vec<u32>);

#[test]
fn scores_and_updates_are_the_same_with_and_without() -> Result<()> {
    let rewards = [RewardKind::Ocr, RewardKind::JpegCompressibility, RewardKind::Colour].map(RewardConfig::new);
    let run = |ranks: usize, overlap: &str| -> Result<Vec<Record>> {
        ThreadGroup::run(ranks, |world| {
            let (mut trainer, _) = trainer(&world, &[&format!("parallel.reward_overlap={overlap}")])?;
            trainer.score_by(build(&rewards, 2)?.into())?;
            let mut metrics = Vec::new();
            for iteration in 0..2 {
                for update in trainer.iteration(iteration, &mut |_| ())? {
                    let known = update.iter().filter(|(name, _)| !name.starts_with("time."));
                    metrics.push(known.map(|(name, value)| (name.to_string(), value.to_bits())).collect());
                }
            }
            let state = trainer.state.snapshot()?.vectors.into_values().flatten().map(f32::to_bits).collect();
            Ok((metrics, state))
        })
    };
    for ranks in [1, 2] {
        let (with, without) = (run(ranks, "on")?, run(ranks, "off")?);
        assert!(with == without, "{ranks} ranks");
        assert!(with[0].0[0].contains_key("reward.ocr.mean"));
    }
    Ok(())
}
