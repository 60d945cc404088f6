//! Killed again and again, at any instant, a run loses nothing. `launch/stress.sh` runs it with a hundred kills.

use crate::common::Job;
use crate::runs::{TIMEOUT, Training, alone};
use flowrl_dist::checkpoint;
use std::time::{Duration, Instant};

/// Updates between checkpoints.
const EVERY: u64 = 2;

/// The longest that a life lasts: through the start, the first collectives, and several updates and saves.
const LIFE: Duration = Duration::from_millis(6000);

#[test]
fn a_run_that_is_killed_again_and_again_ends_as_the_unbroken_one() {
    let _alone = alone();
    let kills: u64 = std::env::var("FLOWRL_STRESS_KILLS").map_or(4, |kills| kills.parse().unwrap());
    let every = format!("run.checkpoint_every={EVERY}");
    let settings = [every.as_str(), "run.eval_every=0", "batch.timesteps=1", "sampler.steps=2", "eval.prompts=2"];
    let training = Training::new(&settings);
    let mut killed_saving = 0;
    for kill in 0..kills {
        let never = training.newest_logged() + 1000; // more updates than fit into a life
        let mut job = Job::start(&mut training.command(2, never));
        let (life, rank) = (LIFE.mul_f64(random()), usize::from(random() < 0.5));
        while job.is_running() && !job.has_rank(rank) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let since = Instant::now();
        while job.is_running() && since.elapsed() < life {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(job.has_rank(rank), "kill {kill}: {}", job.finish(TIMEOUT));
        job.signal_rank("KILL", rank);
        job.finish(TIMEOUT).assert_no_leftovers();

        let root = training.path("checkpoints");
        let unfinished = |name: &str| name.starts_with(".writing-") || name.starts_with(".replaced-");
        let names = std::fs::read_dir(&root).into_iter().flatten().flatten();
        killed_saving += u32::from(names.into_iter().any(|e| unfinished(&e.file_name().to_string_lossy())));
        let saved = checkpoint::newest(&root).unwrap();
        if let Some(found) = &saved {
            checkpoint::open(&found.path).unwrap().verify().unwrap();
        }
        // A save is begun every `EVERY` updates and completed one update later.
        let (saved, logged) = (saved.map_or(0, |found| found.update), training.newest_logged());
        assert!(saved + EVERY + 1 >= logged, "kill {kill}: {saved} saved, {logged} logged");
    }
    let updates = training.newest_logged() + 4;
    training.run(2, updates);
    let unbroken = Training::new(&settings);
    unbroken.run(2, updates);
    eprintln!("{kills} kills, {killed_saving} of them in a save, {updates} updates");
    training.record().assert_equal(&unbroken.record());
}

/// Uniform in [0, 1), from the clock.
fn random() -> f64 {
    let nanos = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    (nanos.wrapping_mul(6_364_136_223_846_793_005).rotate_left(31) >> 11) as f64 / (1u64 << 53) as f64
}
