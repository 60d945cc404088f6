//! Rewards to group-relative advantages: pure, in f64, the same on every rank because every rank holds all rewards.

mod map;
mod score;

pub use map::{AdvantageMap, Aggregate, Map, Normaliser};
pub use score::{Score, Scores};

use crate::error::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};

/// The advantages of an iteration and what they say about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Advantages {
    /// One per image, in the order of the rewards; 0 in a group that was dropped.
    pub values: Vec<f64>,
    /// Groups with a score that failed: their images cannot be compared, and their scores count nowhere.
    pub dropped: BTreeSet<usize>,
    /// Share of groups without a signal (all rewards equal, but for rounding): their advantages are 0.
    pub zero_groups: f64,
    /// Share of images whose advantage a bound changed.
    pub clipped: f64,
    /// Root mean square of the advantages.
    pub rms: f64,
    /// Effective sample size `(sum w)^2 / sum w^2` of the softmax weights as a share of K, mean over groups; 1 if the
    /// map has no weights.
    pub effective: f64,
    /// Temperature of the softmax maps: as configured, or more where the map raised it.
    pub temperature: f64,
}

/// Group-relative advantages of the rewards; `groups[i]` names the group of image i.
///
/// Groups may be of any size and lie anywhere. A group whose rewards are equal, or differ by the rounding of their sum only,
/// gets exactly 0.
///
/// # Errors
/// [`Error::NotFinite`] if a reward or an advantage is not finite; it names reward, image and group. [`Error::Reward`] if all
/// groups are dropped.
pub fn group_advantages(rewards: &[Scores], groups: &[usize], config: &AdvantageMap) -> Result<Advantages> {
    let has_failed = |image: usize| rewards.iter().any(|reward| reward.scores[image] == Score::Failed);
    let dropped: BTreeSet<usize> = (0..groups.len()).filter(|&image| has_failed(image)).map(|i| groups[i]).collect();
    let kept: Vec<usize> = (0..groups.len()).filter(|&image| !dropped.contains(&groups[image])).collect();
    if kept.is_empty() {
        let name = rewards.iter().map(|reward| reward.name.as_str()).collect::<Vec<_>>().join(", ");
        let message = "no group of this iteration has all its scores; see the warnings, and start the server again";
        return Err(Error::Reward { name, message: message.to_string() });
    }
    let of_kept = |reward: &Scores| Scores::new(&reward.name, reward.weight, kept.iter().map(|&i| reward.scores[i]));
    let rewards: Vec<Scores> = rewards.iter().map(of_kept).collect();
    let groups_kept: Vec<usize> = kept.iter().map(|&image| groups[image]).collect();
    let of_kept = of_whole_groups(&rewards, &groups_kept, config)?;
    let mut values = vec![0.0; groups.len()];
    kept.iter().zip(&of_kept.values).for_each(|(&image, &value)| values[image] = value);
    Ok(Advantages { values, dropped, ..of_kept })
}

/// The advantages of groups of which no score failed.
fn of_whole_groups(rewards: &[Scores], groups: &[usize], config: &AdvantageMap) -> Result<Advantages> {
    check_finite(rewards, groups)?;
    let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    groups.iter().enumerate().for_each(|(i, &group)| members.entry(group).or_default().push(i));

    // rewards -> normalised -> bounded -> mapped -> bounded
    let Normalised { values: normalised, sizes } = aggregated(rewards, &members, groups.len(), config);
    // A bound makes a number of what is none: minimum and maximum leave a NaN out.
    check_numbers("normalised reward", &normalised, groups)?;
    let bounded: Vec<f64> = normalised.iter().map(|a| a.clamp(-config.clip, config.clip)).collect();
    let (loud, silent): (Vec<_>, Vec<_>) = members.values().partition(|group| has_signal(group, &bounded, &sizes));
    let of = |group: &[usize]| group.iter().map(|&i| bounded[i]).collect::<Vec<f64>>();
    let temperature = config.temperature_for(&loud.iter().map(|group| of(group)).collect::<Vec<_>>());

    let mut values = vec![0.0; groups.len()];
    let (mut clipped, mut effective) = (0, silent.len() as f64);
    for group in loud {
        let mapped = config.mapped(&of(group), temperature);
        effective += mapped.effective;
        for (place, &i) in group.iter().enumerate() {
            values[i] = mapped.values[place];
            clipped += usize::from(mapped.bounded[place] || bounded[i] != normalised[i]);
        }
    }
    check_numbers("advantage", &values, groups)?;
    let (images, count) = (groups.len().max(1) as f64, members.len().max(1) as f64);
    Ok(Advantages {
        zero_groups: silent.len() as f64 / count,
        clipped: clipped as f64 / images,
        rms: (values.iter().map(|a| a * a).sum::<f64>() / images).sqrt(),
        effective: effective / count,
        temperature,
        values,
        dropped: BTreeSet::new(),
    })
}

fn check_finite(rewards: &[Scores], groups: &[usize]) -> Result<()> {
    for Scores { name, scores, .. } in rewards {
        for (i, score) in scores.iter().enumerate() {
            if let Some(score) = score.value().filter(|score| !score.is_finite()) {
                return Err(Error::NotFinite(format!("reward {name}: {score} of image {i}, prompt {}", groups[i])));
            }
        }
    }
    Ok(())
}

/// Refuses what is not finite of one number an image.
fn check_numbers(what: &str, values: &[f64], groups: &[usize]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::NotFinite(format!("{what} {} of image {i}, prompt {}", values[i], groups[i]))),
    }
}

type Members = BTreeMap<usize, Vec<usize>>;

/// Rewards in units of their scale, one number an image.
struct Normalised {
    /// Distances from the groups' means.
    values: Vec<f64>,
    /// How large the numbers are, together, that a value is made of: what its rounding is relative to.
    sizes: Vec<f64>,
}

/// Differences below this share of the numbers that they are differences of are rounding.
const ROUNDING: f64 = 64.0 * f64::EPSILON;

/// Whether the values of a group differ by more than rounding.
fn has_signal(group: &[usize], values: &[f64], sizes: &[f64]) -> bool {
    let of_group = |all: &[f64], join: fn(f64, f64) -> f64| group.iter().map(|&i| all[i]).reduce(join).unwrap_or(0.0);
    let spread = of_group(values, f64::max) - of_group(values, f64::min);
    spread > ROUNDING * of_group(sizes, f64::max)
}

/// The rewards as one number an image.
fn aggregated(rewards: &[Scores], members: &Members, images: usize, config: &AdvantageMap) -> Normalised {
    // A reward that is only watched does not make a score out of none.
    let rewards: Vec<&Scores> = rewards.iter().filter(|reward| reward.weight != 0.0).collect();
    match config.aggregate {
        Aggregate::Sum => {
            let (mut sums, mut sizes) = (vec![None; images], vec![0.0; images]);
            for reward in rewards {
                for (i, score) in reward.scores.iter().enumerate().filter_map(|(i, score)| Some((i, score.value()?))) {
                    let term = reward.weight * score;
                    sums[i] = Some(sums[i].map_or(term, |sum| sum + term));
                    sizes[i] += term.abs();
                }
            }
            normalised(&sums, &sizes, members, config.normaliser)
        }
        Aggregate::Normalised => {
            let mut all = Normalised { values: vec![0.0; images], sizes: vec![0.0; images] };
            for reward in rewards {
                let scores: Vec<Option<f64>> = reward.scores.iter().map(|score| score.value()).collect();
                let sizes: Vec<f64> = scores.iter().map(|score| score.unwrap_or(0.0).abs()).collect();
                let one = normalised(&scores, &sizes, members, config.normaliser);
                all.values.iter_mut().zip(one.values).for_each(|(sum, a)| *sum += reward.weight * a);
                all.sizes.iter_mut().zip(one.sizes).for_each(|(sum, size)| *sum += reward.weight.abs() * size);
            }
            all
        }
    }
}

/// Distance of each score from its group's mean in units of the normaliser; 0 for an image without a score. `sizes`: of the
/// numbers that a score is the sum of.
fn normalised(scores: &[Option<f64>], sizes: &[f64], members: &Members, normaliser: Normaliser) -> Normalised {
    let known = |group: &[usize]| group.iter().filter_map(|&i| scores[i]).collect::<Vec<f64>>();
    let mut centred = vec![None; scores.len()];
    for group in members.values() {
        let mean = mean(&known(group));
        group.iter().for_each(|&i| centred[i] = scores[i].map(|score| score - mean));
    }
    let everything: Vec<f64> = scores.iter().copied().flatten().collect();
    let global = match normaliser {
        Normaliser::GlobalStd => deviation(&everything) + 1e-4,
        Normaliser::PooledRms => {
            let rms = root_mean_square(centred.iter().copied().flatten());
            // Below this, differences are rounding: no signal, rather than rounding scaled up to a signal.
            let floor = f64::max(1e-8, 1e-4 * root_mean_square(everything.iter().copied()));
            if rms > floor { rms } else { f64::INFINITY }
        }
        Normaliser::GroupStd => 0.0,
        Normaliser::None => 1.0,
    };
    let mut out = Normalised { values: vec![0.0; scores.len()], sizes: vec![0.0; scores.len()] };
    for group in members.values() {
        let scale = match normaliser {
            Normaliser::GroupStd => deviation(&known(group)) + 1e-4,
            _ => global,
        };
        for &i in group {
            out.values[i] = centred[i].map_or(0.0, |c| c / scale);
            out.sizes[i] = sizes[i] / scale;
        }
    }
    out
}

/// Mean, exact for equal values; 0 for none.
fn mean(values: &[f64]) -> f64 {
    let Some(first) = values.first() else { return 0.0 };
    first + values.iter().map(|v| v - first).sum::<f64>() / values.len() as f64
}

/// Standard deviation of the population.
fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    root_mean_square(values.iter().map(|v| v - mean))
}

fn root_mean_square(values: impl Iterator<Item = f64>) -> f64 {
    let (count, sum) = values.fold((0usize, 0.0), |(n, sum), v| (n + 1, sum + v * v));
    (sum / count.max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests;
