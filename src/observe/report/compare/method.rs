//! One method: what its seeds have in common, update by update.

use crate::error::{Error, Result};
use crate::observe::report::run::{Points, Run, points};
use std::collections::BTreeSet;

/// The seeds of one method as one curve.
pub struct Method {
    /// `run.name` of all its runs.
    pub name: String,
    /// How many runs.
    pub seeds: usize,
    /// Every evaluation that all seeds have, in order.
    pub curve: Vec<Point>,
    /// The first of them.
    pub start: Point,
    /// The first of those with the largest reward.
    pub best: Point,
    /// The last of them.
    pub end: Point,
    /// Share of exact reads at the end.
    pub exact: Option<f64>,
    /// Colour reward at the end.
    pub colours: Option<f64>,
    /// Of training, without the evaluations.
    pub seconds_per_update: Option<f64>,
    /// What a reader should know before comparing.
    pub notes: Vec<String>,
}

/// One evaluation; means over the seeds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// After this update.
    pub update: f64,
    /// Images sampled for training until then.
    pub images: f64,
    /// Seconds trained until then.
    pub seconds: f64,
    /// Held-out reward.
    pub reward: f64,
    /// The smallest reward of a seed.
    pub low: f64,
    /// The largest reward of a seed.
    pub high: f64,
}

/// The finite held-out values of a reward by update.
pub fn held_out(run: &Run, reward: &str) -> Points {
    finite(run, &format!("eval.reward.{reward}.mean"))
}

impl Method {
    /// Joins the runs of one name. Fails if they have no evaluation after the same update.
    pub fn new(name: &str, runs: &[&Run], reward: &str) -> Result<Self> {
        let seeds: Vec<Points> = runs.iter().map(|run| held_out(run, reward)).collect();
        let updates: BTreeSet<u64> = seeds.iter().flatten().map(|(update, _)| *update as u64).collect();
        let point = |update: u64| {
            let rewards: Vec<f64> = seeds.iter().map(|points| at(points, update)).collect::<Option<_>>()?;
            let (images, seconds): (Vec<_>, Vec<_>) = runs.iter().map(|run| run.spent(update)).unzip();
            Some(Point {
                update: update as f64,
                images: mean(&images),
                seconds: mean(&seconds),
                reward: mean(&rewards),
                low: rewards.iter().copied().fold(f64::INFINITY, f64::min),
                high: rewards.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            })
        };
        let curve: Vec<Point> = updates.iter().filter_map(|update| point(*update)).collect();
        let (Some(start), Some(end)) = (curve.first().copied(), curve.last().copied()) else {
            let message = format!("{name:?}: its runs have no evaluation after the same update; give one of them");
            return Err(Error::Usage(message));
        };
        let better = |best: Point, point: &Point| if point.reward > best.reward { *point } else { best };

        let at_end = |metric: &str| {
            let values = runs.iter().map(|run| at(&finite(run, metric), end.update as u64));
            values.collect::<Option<Vec<f64>>>().map(|values| mean(&values))
        };
        let paces = runs.iter().map(|run| match run.updates.len() {
            0 => None,
            updates => Some(run.spent(u64::MAX).1 / updates as f64),
        });
        let uneven = (curve.len() < updates.len()).then(|| {
            format!(
                "its seeds were not evaluated after the same updates: of {} updates the {} that all {} seeds have count, \
                 the last is {}",
                updates.len(),
                curve.len(),
                runs.len(),
                end.update
            )
        });
        Ok(Self {
            name: name.to_owned(),
            seeds: runs.len(),
            start,
            best: curve.iter().fold(start, better),
            end,
            exact: at_end("eval.exact"),
            colours: at_end("eval.reward.colour.mean"),
            seconds_per_update: paces.collect::<Option<Vec<f64>>>().map(|paces| mean(&paces)),
            notes: uneven.into_iter().chain(repeated_seed(runs)).collect(),
            curve,
        })
    }

    /// Where the curve first reaches `reward`, on straight lines between the evaluations; `None` if it never does.
    pub fn reaches(&self, reward: f64) -> Option<Point> {
        let after = self.curve.iter().position(|point| point.reward >= reward)?;
        let (a, b) = (self.curve[after.saturating_sub(1)], self.curve[after]);
        let share = if after > 0 { (reward - a.reward) / (b.reward - a.reward) } else { 1.0 };
        let between = |of: fn(&Point) -> f64| of(&a) + share * (of(&b) - of(&a));
        Some(Point {
            update: between(|point| point.update),
            images: between(|point| point.images),
            seconds: between(|point| point.seconds),
            reward: between(|point| point.reward),
            low: between(|point| point.low),
            high: between(|point| point.high),
        })
    }
}

/// A note if two runs of one name have the same seed: they may be of different methods.
fn repeated_seed(runs: &[&Run]) -> Option<String> {
    let seeds: Vec<String> = runs.iter().filter_map(|run| run.setting("run", "seed")).collect();
    let count = |seed: &String| seeds.iter().filter(|other| *other == seed).count();
    let seed = seeds.iter().find(|seed| count(seed) > 1)?;
    Some(format!(
        "{} of its runs have the seed {seed}; if they are other methods, name them apart (run.name)",
        count(seed)
    ))
}

fn finite(run: &Run, metric: &str) -> Points {
    points(&run.evaluations, metric).into_iter().filter(|(_, value)| value.is_finite()).collect()
}

fn at(points: &Points, update: u64) -> Option<f64> {
    points.iter().find(|(other, _)| *other == update as f64).map(|(_, value)| *value)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}
