//! Scores images batch by batch, while the next ones are sampled.

use super::{Requests, Reward, ScoreResult, check_count};
use crate::data::Prompt;
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Rewards that several threads use.
pub type Rewards = Arc<[Box<dyn Reward>]>;

/// Whether images are scored while the next ones are sampled. The scores are the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overlap {
    /// Where scoring and sampling do not share the same cores: by servers, and beside a GPU.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never: when all are sampled.
    Off,
}

impl Overlap {
    fn applies(self, elsewhere: bool, device: &Device) -> bool {
        match self {
            Overlap::Auto => elsewhere || !device.is_cpu(),
            Overlap::On => true,
            Overlap::Off => false,
        }
    }
}

/// Images on their way through the rewards: batches go in in the order of the images, all scores come out in that order.
///
/// The rewards that are computed here have one thread, so that they use no more cores than they would alone; one that is
/// computed elsewhere has a thread for each request that it may have under way. A scoring that is dropped is waited for by
/// nobody: its threads end after the call that they are in.
pub struct Scoring {
    rewards: Rewards,
    lanes: Vec<Lane>,
    /// Nothing more is to be scored: something failed for good, or nobody waits for it.
    over: Arc<AtomicBool>,
}

/// Some of the rewards, and the threads that compute them.
struct Lane {
    shared: Arc<Shared>,
    jobs: Sender<Job>,
    requests: Requests,
    workers: Vec<JoinHandle<Vec<Done>>>,
}

/// What the threads of a lane share.
struct Shared {
    rewards: Rewards,
    /// Their places among the rewards.
    places: Vec<usize>,
    jobs: Mutex<Receiver<Job>>,
    /// Asking further is in vain: the scores of the remaining images fail.
    unavailable: AtomicBool,
    over: Arc<AtomicBool>,
}

/// Images from `start` with their prompts.
struct Job {
    start: usize,
    images: Tensor,
    prompts: Vec<Prompt>,
}

/// What came of a job, of one reward.
struct Done {
    reward: usize,
    start: usize,
    result: Result<ScoreResult>,
    took: Duration,
}

impl Scoring {
    /// For samples that are made on `device`.
    ///
    /// # Errors
    /// [`Error::Failed`]: a thread cannot be started.
    pub fn new(rewards: &Rewards, overlap: Overlap, device: &Device) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let mut scoring = Self { rewards: rewards.clone(), lanes: Vec::new(), over };
        let (elsewhere, here): (Vec<usize>, Vec<usize>) =
            (0..rewards.len()).partition(|&place| rewards[place].requests().is_some());
        if !here.is_empty() {
            scoring.add_lane(here, Requests { images: usize::MAX, at_once: 1 }, overlap.applies(false, device))?;
        }
        for place in elsewhere {
            let requests = rewards[place].requests().unwrap_or(Requests { images: 1, at_once: 1 });
            scoring.add_lane(vec![place], requests, overlap.applies(true, device))?;
        }
        Ok(scoring)
    }

    fn add_lane(&mut self, places: Vec<usize>, requests: Requests, begun: bool) -> Result<()> {
        let (jobs, queue) = channel();
        let shared = Arc::new(Shared {
            rewards: self.rewards.clone(),
            places,
            jobs: Mutex::new(queue),
            unavailable: AtomicBool::new(false),
            over: self.over.clone(),
        });
        let mut lane = Lane { shared, jobs, requests, workers: Vec::new() };
        if begun {
            lane.start()?;
        }
        self.lanes.push(lane);
        Ok(())
    }

    /// The next images `[n, 3, H, W]`, which begin at image `start`, with their prompts.
    pub fn add(&mut self, start: usize, images: &Tensor, prompts: &[Prompt]) -> Result<()> {
        // Here, where the images are made: a copy from a GPU waits for all that it was asked to do before.
        let images = images.to_device(&Device::Cpu)?;
        for lane in &self.lanes {
            for first in (0..prompts.len()).step_by(lane.requests.images) {
                let prompts: Vec<Prompt> = prompts[first..].iter().take(lane.requests.images).cloned().collect();
                let job = Job { start: start + first, images: images.narrow(0, first, prompts.len())?, prompts };
                lane.jobs.send(job).ok(); // a lane whose threads are gone is noticed at the end
            }
        }
        Ok(())
    }

    /// Waits for all scores: what came of each reward, and the time that its calls took, added up.
    ///
    /// # Errors
    /// Of the calls that failed that of the first reward on its first images. A panic of a reward goes on in the caller.
    pub fn finish(mut self) -> Result<(Vec<ScoreResult>, Duration)> {
        let mut lanes = std::mem::take(&mut self.lanes);
        lanes.iter_mut().filter(|lane| lane.workers.is_empty()).try_for_each(Lane::start)?;
        // Without their senders the queues end.
        let workers: Vec<_> = lanes.into_iter().flat_map(|lane| lane.workers).collect();
        let mut done: Vec<Done> = Vec::new();
        for worker in workers {
            match worker.join() {
                Ok(part) => done.extend(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done.sort_by_key(|done| (done.reward, done.start));
        let mut all = vec![ScoreResult::default(); self.rewards.len()];
        let mut busy = Duration::ZERO;
        for Done { reward, result, took, .. } in done {
            busy += took;
            all[reward].append(result?);
        }
        Ok((all, busy))
    }
}

impl Drop for Scoring {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

impl Lane {
    fn start(&mut self) -> Result<()> {
        for _ in 0..self.requests.at_once {
            let shared = self.shared.clone();
            let worker = std::thread::Builder::new().name("rewards".into()).spawn(move || shared.work());
            self.workers.push(worker.map_err(|e| Error::Failed(format!("a thread for the rewards: {e}")))?);
        }
        Ok(())
    }
}

impl Shared {
    /// Takes jobs until there are no more to come.
    fn work(&self) -> Vec<Done> {
        let mut done = Vec::new();
        loop {
            let job = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(Job { start, images, prompts }) = job else { return done };
            for &reward in &self.places {
                if self.over.load(Ordering::SeqCst) {
                    return done;
                }
                let since = Instant::now();
                let result = self.try_score(&*self.rewards[reward], &images, &prompts);
                if result.is_err() {
                    self.over.store(true, Ordering::SeqCst);
                }
                done.push(Done { reward, start, result, took: since.elapsed() });
            }
        }
    }

    fn try_score(&self, reward: &dyn Reward, images: &Tensor, prompts: &[Prompt]) -> Result<ScoreResult> {
        if self.unavailable.load(Ordering::SeqCst) {
            return Ok(ScoreResult::unavailable(prompts.len()));
        }
        let result = reward.try_score(images, prompts)?;
        check_count(reward.name(), result.scores.len(), prompts)?;
        if result.unavailable {
            self.unavailable.store(true, Ordering::SeqCst);
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::advantage::Score;
    use crate::data::PromptSet;
    use crate::reward::{RewardConfig, RewardKind, build};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc::RecvTimeoutError;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Seven images of 24 x 48 and their prompts.
    fn seven() -> Result<(Tensor, Vec<Prompt>)> {
        let values: Vec<f32> = (0..7 * 3 * 24 * 48).map(|i| ((i * i) % 257) as f32 / 256.0).collect();
        let prompts = (0..7).map(|i| format!("\"{i}a{i}\" in red on yellow")).collect::<PromptSet>().prompts;
        Ok((Tensor::from_vec(values, (7, 3, 24, 48), &Device::Cpu)?, prompts))
    }

    /// What came of the images in batches of one size.
    fn in_batches(rewards: &Rewards, overlap: Overlap, size: usize) -> Result<Vec<ScoreResult>> {
        let (images, prompts) = seven()?;
        let mut scoring = Scoring::new(rewards, overlap, &Device::Cpu)?;
        for start in (0..7).step_by(size) {
            let count = size.min(7 - start);
            scoring.add(start, &images.narrow(0, start, count)?, &prompts[start..start + count])?;
        }
        Ok(scoring.finish()?.0)
    }

    #[test]
    fn scores_are_those_of_all_images_at_once_however_they_come() -> Result<()> {
        let kinds = [RewardKind::Ocr, RewardKind::JpegCompressibility, RewardKind::Colour];
        let rewards: Rewards = build(&kinds.map(RewardConfig::new), 2)?.into();
        let (images, prompts) = seven()?;
        let whole = rewards.iter().map(|reward| reward.try_score(&images, &prompts)).collect::<Result<Vec<_>>>()?;
        assert!(whole[1].scores.iter().any(|score| *score != whole[1].scores[0]), "scores differ between images");
        for (overlap, size) in [(Overlap::On, 1), (Overlap::On, 3), (Overlap::Off, 3), (Overlap::Auto, 7)] {
            assert!(in_batches(&rewards, overlap, size)? == whole, "{overlap:?}, batches of {size}");
        }
        Ok(())
    }

    /// Does what `does` says with the images of its n-th call.
    struct Doing<F> {
        requests: Option<Requests>,
        calls: Mutex<usize>,
        does: F,
    }

    impl<F: Fn(usize, usize) -> Result<ScoreResult> + Send + Sync> Reward for Doing<F> {
        fn name(&self) -> &str {
            "doing"
        }
        fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
            Ok(self.try_score(images, prompts)?.scores.into_iter().map(Score::value).collect())
        }
        fn try_score(&self, _: &Tensor, prompts: &[Prompt]) -> Result<ScoreResult> {
            let call = {
                let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
                *calls += 1;
                *calls - 1
            };
            (self.does)(call, prompts.len())
        }
        fn requests(&self) -> Option<Requests> {
            self.requests
        }
    }

    fn doing(
        requests: Option<Requests>,
        does: impl Fn(usize, usize) -> Result<ScoreResult> + Send + Sync + 'static,
    ) -> Rewards {
        Arc::new([Box::new(Doing { requests, calls: Mutex::new(0), does }) as _])
    }

    fn scored(images: usize) -> Result<ScoreResult> {
        Ok(ScoreResult { scores: vec![Score::Value(1.0); images], unavailable: false })
    }

    #[test]
    fn what_fails_ends_the_scoring_with_its_error_and_nothing_more_is_asked() -> Result<()> {
        for overlap in [Overlap::On, Overlap::Off] {
            let (tell, told) = channel();
            let rewards = doing(None, move |call, images| {
                tell.send(call).ok();
                match call {
                    2 => Err(Error::Reward { name: "doing".into(), message: "it is gone".into() }),
                    _ => scored(images),
                }
            });
            let error = in_batches(&rewards, overlap, 1).expect_err("the third call fails").to_string();
            assert_eq!(error, "reward doing: it is gone");
            drop(rewards);
            assert_eq!(told.into_iter().collect::<Vec<_>>(), [0, 1, 2]);
        }
        Ok(())
    }

    #[test]
    fn after_a_failure_for_good_the_remaining_images_have_no_score() -> Result<()> {
        let rewards = doing(Some(Requests { images: 2, at_once: 1 }), |call, images| match call {
            0 => scored(images),
            1 => Ok(ScoreResult::unavailable(images)),
            _ => panic!("asked in vain"),
        });
        let all = in_batches(&rewards, Overlap::Auto, 3)?; // 2 + 1, 2 + 1, 1
        let scores = [vec![Score::Value(1.0); 2], vec![Score::Failed; 5]].concat();
        assert_eq!(all, [ScoreResult { scores, unavailable: true }]);
        let wrong = doing(None, |_, images| scored(images + 1));
        let error = in_batches(&wrong, Overlap::On, 3).expect_err("too many scores").to_string();
        assert!(error.contains("4 images for 3 prompts"), "{error}");
        Ok(())
    }

    /// As many requests as allowed are under way before the first is answered, and never one more.
    #[test]
    fn requests_are_under_way_at_once() -> Result<()> {
        let under_way = Arc::new((Mutex::new((0, 0)), std::sync::Condvar::new()));
        let shared = under_way.clone();
        let rewards = doing(Some(Requests { images: 1, at_once: 3 }), move |call, images| {
            let (counts, changed) = &*shared;
            let mut now = counts.lock().unwrap_or_else(PoisonError::into_inner);
            now.0 += 1;
            now.1 = now.0.max(now.1);
            changed.notify_all();
            if call < 3 {
                let waited = changed.wait_timeout_while(now, PATIENCE, |(_, most)| *most < 3);
                now = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            now.0 -= 1;
            scored(images)
        });
        assert_eq!(in_batches(&rewards, Overlap::Auto, 2)?[0].scores, [Score::Value(1.0); 7]);
        assert_eq!(*under_way.0.lock().unwrap_or_else(PoisonError::into_inner), (0, 3));
        Ok(())
    }

    #[test]
    fn a_panic_of_a_reward_is_the_callers() {
        for overlap in [Overlap::On, Overlap::Off] {
            let rewards = doing(None, |call, images| if call == 1 { panic!("bad luck") } else { scored(images) });
            let outcome = catch_unwind(AssertUnwindSafe(|| in_batches(&rewards, overlap, 2).map(drop)));
            let panic = outcome.expect_err("the second call panics");
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"bad luck"));
        }
    }

    /// Whoever gives up does not wait for the call under way, and no other is made.
    #[test]
    fn a_scoring_that_is_dropped_holds_nobody_up() -> Result<()> {
        let ((tell, told), (answer, answers)) = (channel(), channel::<()>());
        let answers = Mutex::new(answers);
        let rewards = doing(None, move |call, images| {
            tell.send(call).ok();
            let waited = answers.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(PATIENCE);
            assert_eq!(waited, Ok(()));
            scored(images)
        });
        let (images, prompts) = seven()?;
        let mut scoring = Scoring::new(&rewards, Overlap::On, &Device::Cpu)?;
        scoring.add(0, &images, &prompts)?;
        scoring.add(7, &images, &prompts)?;
        assert_eq!(told.recv_timeout(PATIENCE), Ok(0));
        drop((scoring, rewards)); // comes back while the call waits for its answer
        answer.send(()).expect("the call is still under way");
        assert_eq!(told.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected), "no second call");
        Ok(())
    }
}
