//! Rewards to group-relative advantages: pure, in f64, the same on every rank because every rank holds all rewards.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a reward's distance from its group's mean is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normaliser {
    /// Standard deviation of all rewards of the iteration + 1e-4 (DiffusionNFT, FlowAWR, Flow-GRPO:
    /// flow_grpo/stat_tracking.py with `global_std`).
    GlobalStd,
    /// Root mean square of the distances from the group means, over all images (AdvantageFlow).
    PooledRms,
    /// Standard deviation within the group + 1e-4.
    GroupStd,
}

/// How a normalised reward becomes an advantage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Map {
    /// It is the advantage.
    Linear,
    /// `K softmax(a / temperature) - 1` within the group.
    Softmax,
    /// `e / max(std(e) + 1e-4, 1e-2)` with `e = softmax(a / temperature) - 1/K` within the group: for rule rewards,
    /// where a group's best image often stands alone.
    GatedSoftmax,
}

/// Rewards to advantages.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdvantageMap {
    /// The scale of a reward.
    pub normaliser: Normaliser,
    /// Bound of the normalised reward.
    pub clip: f64,
    /// The map.
    pub map: Map,
    /// Temperature of the softmax maps.
    pub temperature: f64,
    /// Bound of a softmax map's advantage.
    pub map_clip: f64,
}

impl AdvantageMap {
    /// FlowAWR's for model rewards (released program, flow_grpo/stat_tracking.py at 05e993aa).
    pub const FLOW_AWR: Self =
        Self { normaliser: Normaliser::GlobalStd, clip: 5.0, map: Map::Softmax, temperature: 1.0, map_clip: 3.0 };
    /// AdvantageFlow's: linear in units of the pooled within-group deviation, within 1.
    pub const ADVANTAGE_FLOW: Self =
        Self { normaliser: Normaliser::PooledRms, clip: 1.0, map: Map::Linear, temperature: 1.0, map_clip: 3.0 };
}

/// The advantages of an iteration and what they say about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Advantages {
    /// One an image, in the order of the rewards.
    pub values: Vec<f64>,
    /// Share of groups whose rewards are all equal: their advantages are 0.
    pub zero_groups: f64,
    /// Share of images whose advantage a bound changed.
    pub clipped: f64,
    /// Effective sample size `(sum w)^2 / sum w^2` of the softmax weights as a share of K, mean over groups; 1 if the
    /// map has no weights.
    pub effective: f64,
}

/// Group-relative advantages of `rewards`; `groups[i]` names the group of image i.
///
/// Groups may be of any size and lie anywhere. A group of equal rewards gets exactly 0.
///
/// # Errors
/// [`Error::NotFinite`] if a reward or an advantage is not finite.
pub fn group_advantages(rewards: &[f64], groups: &[usize], config: &AdvantageMap) -> Result<Advantages> {
    if let Some(i) = rewards.iter().position(|r| !r.is_finite()) {
        return Err(Error::NotFinite(format!("reward {} of image {i}, prompt {}", rewards[i], groups[i])));
    }
    let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (i, &group) in groups.iter().enumerate() {
        members.entry(group).or_default().push(i);
    }
    let mut centred = vec![0.0; rewards.len()];
    for group in members.values() {
        let mean = mean(group.iter().map(|&i| rewards[i]));
        group.iter().for_each(|&i| centred[i] = rewards[i] - mean);
    }

    let mut out = Advantages { values: vec![0.0; rewards.len()], zero_groups: 0.0, clipped: 0.0, effective: 0.0 };
    let global = match config.normaliser {
        Normaliser::GlobalStd => deviation(rewards) + 1e-4,
        Normaliser::PooledRms => mean(centred.iter().map(|c| c * c)).sqrt(),
        Normaliser::GroupStd => 0.0,
    };
    for group in members.values() {
        if group.iter().all(|&i| rewards[i] == rewards[group[0]]) {
            out.zero_groups += 1.0;
            out.effective += 1.0;
            continue;
        }
        let scale = match config.normaliser {
            Normaliser::GroupStd => deviation(&group.iter().map(|&i| rewards[i]).collect::<Vec<_>>()) + 1e-4,
            _ => global,
        };
        let normalised: Vec<f64> = group.iter().map(|&i| centred[i] / scale).collect();
        let bounded: Vec<f64> = normalised.iter().map(|a| a.clamp(-config.clip, config.clip)).collect();
        let mapped = mapped(&bounded, config, &mut out.effective);
        for (place, &i) in group.iter().enumerate() {
            out.values[i] = match config.map {
                Map::Linear => mapped[place],
                _ => mapped[place].clamp(-config.map_clip, config.map_clip),
            };
            if bounded[place] != normalised[place] || out.values[i] != mapped[place] {
                out.clipped += 1.0;
            }
        }
    }
    out.zero_groups /= members.len().max(1) as f64;
    out.effective /= members.len().max(1) as f64;
    out.clipped /= rewards.len().max(1) as f64;
    match out.values.iter().position(|a| !a.is_finite()) {
        Some(i) => Err(Error::NotFinite(format!("advantage {} of image {i}, prompt {}", out.values[i], groups[i]))),
        None => Ok(out),
    }
}

/// One group's advantages before their bound; adds the group's share of effective samples.
fn mapped(a: &[f64], config: &AdvantageMap, effective: &mut f64) -> Vec<f64> {
    let k = a.len() as f64;
    if config.map == Map::Linear {
        *effective += 1.0;
        return a.to_vec();
    }
    let largest = a.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = a.iter().map(|a| libm::exp((a - largest) / config.temperature)).collect();
    let sum: f64 = weights.iter().sum();
    *effective += sum * sum / weights.iter().map(|w| w * w).sum::<f64>() / k;
    let excess: Vec<f64> = weights.iter().map(|w| w / sum - 1.0 / k).collect();
    match config.map {
        Map::GatedSoftmax => {
            let gate = (deviation(&excess) + 1e-4).max(1e-2);
            excess.iter().map(|e| e / gate).collect()
        }
        _ => excess.iter().map(|e| k * e).collect(),
    }
}

/// Mean, exact for equal values.
fn mean(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let Some(first) = values.clone().next() else { return 0.0 };
    let (count, sum) = values.fold((0.0, 0.0), |(n, s), v| (n + 1.0, s + (v - first)));
    first + sum / count
}

/// Standard deviation of the population.
fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values.iter().copied());
    (values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / values.len().max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    const REWARDS: [f64; 12] = [0.1, 0.2, 0.3, 0.9, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0];
    const GROUPS: [usize; 12] = [7, 7, 7, 7, 3, 3, 3, 3, 5, 5, 5, 5];
    const GATED: AdvantageMap = AdvantageMap { map: Map::GatedSoftmax, ..AdvantageMap::FLOW_AWR };
    const LINEAR: AdvantageMap = AdvantageMap { map: Map::Linear, ..AdvantageMap::FLOW_AWR };

    /// Golden values computed apart from this program from the released programs' formulas.
    #[test]
    fn advantages_equal_the_golden_vectors() -> Result<()> {
        let cases = [
            (LINEAR, [-0.847566, -0.539360, -0.231154, 1.618081], [-0.770515, 2.311545]),
            (AdvantageMap::FLOW_AWR, [-0.749755, -0.659422, -0.536479, 1.945656], [-0.838731, 2.516193]),
            (GATED, [-0.665696, -0.585490, -0.476332, 1.727518], [-0.577191, 1.731574]),
            (AdvantageMap::ADVANTAGE_FLOW, [-0.893198, -0.568399, -0.243599, 1.0], [-0.811998, 1.0]),
        ];
        for (config, first, [low, high]) in cases {
            let a = group_advantages(&REWARDS, &GROUPS, &config)?.values;
            let expected = [first.as_slice(), &[0.0; 4], &[low, low, low, high]].concat();
            assert!(a.iter().zip(&expected).all(|(a, e)| (a - e).abs() < 1e-6), "{config:?}: {a:?}");
            assert_eq!(a[4..8], [0.0; 4]);
        }
        Ok(())
    }

    #[test]
    fn order_of_images_and_names_of_groups_do_not_matter() -> Result<()> {
        let straight = group_advantages(&REWARDS, &GROUPS, &GATED)?.values;
        let order = [3, 11, 4, 0, 8, 7, 1, 9, 5, 2, 10, 6];
        let shuffled: Vec<f64> = order.iter().map(|&i| REWARDS[i]).collect();
        let groups: Vec<usize> = order.iter().map(|&i| 100 - GROUPS[i]).collect();
        let a = group_advantages(&shuffled, &groups, &GATED)?.values;
        assert!(order.iter().zip(&a).all(|(&i, a)| (a - straight[i]).abs() < 1e-12));
        Ok(())
    }

    #[test]
    fn equal_rewards_give_exactly_zero_for_every_map() -> Result<()> {
        for config in [LINEAR, GATED, AdvantageMap::FLOW_AWR, AdvantageMap::ADVANTAGE_FLOW] {
            for value in [0.1, 1.0 / 3.0, -7.3e5, 0.0] {
                let a = group_advantages(&[value; 7], &[1; 7], &config)?;
                assert_eq!((a.values, a.zero_groups), (vec![0.0; 7], 1.0));
            }
        }
        Ok(())
    }

    #[test]
    fn statistics_say_what_was_bounded() -> Result<()> {
        let mut rewards = vec![0.0; 24];
        rewards[0] = 1.0;
        let a = group_advantages(&rewards, &[0; 24], &AdvantageMap::FLOW_AWR)?;
        assert_eq!((a.values[0], a.clipped, a.zero_groups), (3.0, 1.0 / 24.0, 0.0));
        assert!(a.effective < 0.4);
        Ok(())
    }

    #[test]
    fn a_reward_that_is_no_number_is_refused() {
        let error = group_advantages(&[0.0, f64::NAN], &[4, 9], &LINEAR).expect_err("NaN");
        assert!(error.to_string().contains("image 1, prompt 9"), "{error}");
    }
}
