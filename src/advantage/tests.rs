//! The maps against golden vectors, their exact zeros and bounds.

use super::*;

/// Advantages of one reward of weight 1.
fn of(rewards: &[f64], groups: &[usize], config: &AdvantageMap) -> Result<Advantages> {
    group_advantages(&[scores("ocr", 1.0, rewards)], groups, config)
}

fn scores(name: &str, weight: f64, rewards: &[f64]) -> Scores {
    Scores::new(name, weight, rewards.iter().copied())
}

const REWARDS: [f64; 12] = [0.1, 0.2, 0.3, 0.9, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0];
const GROUPS: [usize; 12] = [7, 7, 7, 7, 3, 3, 3, 3, 5, 5, 5, 5];
const GATED: AdvantageMap = AdvantageMap { map: Map::GatedSoftmax, ..AdvantageMap::FLOW_AWR };
const LINEAR: AdvantageMap = AdvantageMap::DIFFUSION_NFT;

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
        let a = of(&REWARDS, &GROUPS, &config)?.values;
        let expected = [first.as_slice(), &[0.0; 4], &[low, low, low, high]].concat();
        assert!(a.iter().zip(&expected).all(|(a, e)| (a - e).abs() < 1e-6), "{config:?}: {a:?}");
        assert_eq!(a[4..8], [0.0; 4]);
    }
    Ok(())
}

/// What is only watched changes nothing, not even where nothing else applies.
#[test]
fn a_reward_of_weight_zero_does_not_count() -> Result<()> {
    let mut trained = scores("ocr", 1.0, &REWARDS);
    trained.scores[..4].fill(Score::NotApplicable);
    let watched = scores("hps", 0.0, &[3.0, 9.0, 1.0, 7.0, 2.0, 8.0, 0.0, 5.0, 4.0, 6.0, 1.0, 2.0]);
    for aggregate in [Aggregate::Sum, Aggregate::Normalised] {
        let config = AdvantageMap { aggregate, ..LINEAR };
        let alone = group_advantages(std::slice::from_ref(&trained), &GROUPS, &config)?;
        assert_eq!(alone.values[..4], [0.0; 4]);
        assert_eq!(group_advantages(&[watched.clone(), trained.clone()], &GROUPS, &config)?, alone);
    }
    Ok(())
}

#[test]
fn order_of_images_and_names_of_groups_do_not_matter() -> Result<()> {
    let straight = of(&REWARDS, &GROUPS, &GATED)?.values;
    let order = [3, 11, 4, 0, 8, 7, 1, 9, 5, 2, 10, 6];
    let shuffled: Vec<f64> = order.iter().map(|&i| REWARDS[i]).collect();
    let groups: Vec<usize> = order.iter().map(|&i| 100 - GROUPS[i]).collect();
    let a = of(&shuffled, &groups, &GATED)?.values;
    assert!(order.iter().zip(&a).all(|(&i, a)| (a - straight[i]).abs() < 1e-12));
    Ok(())
}

#[test]
fn equal_rewards_give_exactly_zero_for_every_map() -> Result<()> {
    for config in [LINEAR, GATED, AdvantageMap::FLOW_AWR, AdvantageMap::ADVANTAGE_FLOW, AdvantageMap::ROBUST] {
        for value in [0.1, 1.0 / 3.0, -7.3e5, 0.0] {
            let a = of(&[value; 7], &[1; 7], &config)?;
            assert_eq!((a.values, a.zero_groups), (vec![0.0; 7], 1.0));
        }
    }
    Ok(())
}

#[test]
fn statistics_say_what_was_bounded() -> Result<()> {
    let mut rewards = vec![0.0; 24];
    rewards[0] = 1.0;
    let a = of(&rewards, &[0; 24], &AdvantageMap::FLOW_AWR)?;
    assert_eq!((a.values[0], a.clipped, a.zero_groups), (3.0, 1.0 / 24.0, 0.0));
    assert!(a.effective < 0.4);
    Ok(())
}

#[test]
fn a_reward_that_is_no_number_is_refused() {
    let error = of(&[0.0, f64::NAN], &[4, 9], &LINEAR).expect_err("NaN");
    assert!(error.to_string().contains("reward ocr: NaN of image 1, prompt 9"), "{error}");
}

/// Rewards that are finite and whose distances are not: no map and no bound makes advantages of them.
#[test]
fn rewards_that_are_too_far_apart_are_refused() {
    let paper = AdvantageMap::FLOW_AWR_PAPER;
    for one in [LINEAR, GATED, AdvantageMap::FLOW_AWR, AdvantageMap::ADVANTAGE_FLOW, AdvantageMap::ROBUST, paper] {
        for aggregate in [Aggregate::Sum, Aggregate::Normalised] {
            for normaliser in [Normaliser::GlobalStd, Normaliser::PooledRms, Normaliser::GroupStd] {
                let config = AdvantageMap { aggregate, normaliser, ..one };
                match of(&[1e308, -1e308, 1e308, 0.0, 1.0, 0.5], &[4, 4, 4, 9, 9, 9], &config) {
                    Err(Error::NotFinite(message)) => assert!(message.contains(" of image "), "{config:?}: {message}"),
                    other => panic!("{config:?}: {other:?}"),
                }
            }
        }
    }
}

/// The weights of the tempered map computed by hand: 24 images of which one is read. With weights
/// e^(0), e^(-d/T) the effective share is (1 + 23 q)^2 / (24 (1 + 23 q^2)); it is 1/3 at q = 0.119..., and then the bound 4
/// cuts the one weight 6.4... and the others get (24 - 4)/23 each.
#[test]
fn the_tempered_map_keeps_a_third_of_the_group_and_the_mean() -> Result<()> {
    let mut rewards = vec![0.0; 24];
    rewards[5] = 1.0;
    let a = of(&rewards, &[0; 24], &AdvantageMap::ROBUST)?;
    assert!((a.effective - 1.0 / 3.0).abs() < 1e-9 && a.temperature > 1.0, "{a:?}");
    assert_eq!((a.values[5], a.clipped), (3.0, 1.0 / 24.0));
    assert!((a.values[0] - (20.0 / 23.0 - 1.0)).abs() < 1e-12, "{a:?}");
    assert!(a.values.iter().sum::<f64>().abs() < 1e-12);
    // Gaussian rewards are left as they are.
    let spread: Vec<f64> = (0..24).map(|i| libm::sin(f64::from(i) * 2.4)).collect();
    let (free, soft) = (of(&spread, &[0; 24], &AdvantageMap::ROBUST)?, AdvantageMap::FLOW_AWR);
    let soft = of(&spread, &[0; 24], &AdvantageMap { normaliser: Normaliser::PooledRms, ..soft })?;
    assert_eq!(free.temperature, 1.0);
    assert!(free.values.iter().zip(&soft.values).all(|(a, b)| (a - b).abs() < 1e-12));
    Ok(())
}

/// 0.1 + 0.2 is not 0.3 to the bit: of sums of several rewards, and of normalised rewards that cancel.
#[test]
fn differences_of_rounding_are_no_signal() -> Result<()> {
    let (tenths, fifths, none) = ([0.1, 0.3, 0.2], [0.2, 0.0, 0.1], [3.7, 2.0, 1.0]);
    assert_ne!(tenths[0] + fifths[0], 0.3);
    let all = |first: [f64; 3], second: [f64; 3]| [first, none].concat().into_iter().zip([second, none].concat());
    let (a, b): (Vec<f64>, Vec<f64>) = all(tenths, fifths).unzip();
    let opposite: Vec<f64> = a.iter().map(|x| 1e3 - 3.0 * x).collect();
    let groups = [1, 1, 1, 2, 2, 2];
    let sum = [scores("a", 1.0, &a), scores("b", 1.0, &b)];
    let cancelling = [scores("a", 0.7, &a), scores("opposite", 0.7, &opposite)];
    for map in [LINEAR, GATED, AdvantageMap::FLOW_AWR, AdvantageMap::ADVANTAGE_FLOW, AdvantageMap::ROBUST] {
        for normaliser in [Normaliser::GlobalStd, Normaliser::PooledRms, Normaliser::GroupStd] {
            let added = group_advantages(&sum, &groups, &AdvantageMap { normaliser, ..map })?;
            assert_eq!((&added.values[..3], added.zero_groups), (&[0.0; 3][..], 0.5), "{map:?}");
            assert!(added.values[3..].iter().all(|a| a.abs() > 0.05), "{added:?}");
        }
        let aggregate = Aggregate::Normalised;
        let map = AdvantageMap { normaliser: Normaliser::PooledRms, aggregate, ..map };
        let a = group_advantages(&cancelling, &groups, &map)?;
        assert_eq!((a.values, a.zero_groups), (vec![0.0; 6], 1.0), "{map:?}");
    }
    // The least difference of f32 numbers is one, where the scale is not the differences' own.
    let near = of(&[1.0, 1.0, 1.0 + f64::from(f32::EPSILON), 0.0, 1.0, 2.0], &groups, &LINEAR)?;
    assert!(near.values[2] > 0.0 && near.zero_groups == 0.0, "{near:?}");
    Ok(())
}

#[test]
fn differences_of_rounding_are_no_signal_for_the_pooled_scale() -> Result<()> {
    let rewards: Vec<f64> = (0..8).map(|i| 1.0 + 1e-6 * f64::from(i)).collect();
    let a = of(&rewards, &[0; 8], &AdvantageMap::ADVANTAGE_FLOW)?;
    assert_eq!((a.values, a.zero_groups), (vec![0.0; 8], 1.0));
    Ok(())
}

/// Two rewards, the second on a scale a hundred times the first: summed raw it decides alone, normalised both count.
#[test]
fn rewards_are_summed_raw_or_in_their_own_units() -> Result<()> {
    let (small, large) = ([0.0, 1.0, 0.0, 1.0], [100.0, 100.0, 0.0, 0.0]);
    let both = [scores("a", 2.0, &small), scores("b", 1.0, &large)];
    let raw = group_advantages(&both, &[0; 4], &AdvantageMap::ADVANTAGE_FLOW)?;
    let scale = (50.0f64 * 50.0 + 1.0).sqrt(); // of +-50 and +-1 (weight 2), independent of each other
    let by_hand = [49.0 / scale, 1.0, -1.0, -49.0 / scale];
    assert!(raw.values.iter().zip(by_hand).all(|(a, b)| (a - b).abs() < 1e-12), "{raw:?}");
    let map = AdvantageMap { aggregate: Aggregate::Normalised, clip: 5.0, ..AdvantageMap::ADVANTAGE_FLOW };
    let own = group_advantages(&both, &[0; 4], &map)?;
    assert!(own.values.iter().zip([-1.0, 3.0, -3.0, 1.0]).all(|(a, b)| (a - b).abs() < 1e-12), "{own:?}");
    Ok(())
}

/// An image to which a reward does not apply neither moves that reward's mean nor gets anything from it.
#[test]
fn a_reward_that_does_not_apply_counts_nothing() -> Result<()> {
    let rule = Scores::new("rule", 1.0, [Some(0.0), Some(1.0), None, None]);
    let both = [scores("a", 1.0, &[0.0, 0.0, 1.0, 3.0]), rule];
    let map = AdvantageMap { aggregate: Aggregate::Normalised, clip: 5.0, ..AdvantageMap::ADVANTAGE_FLOW };
    let a = group_advantages(&both, &[0; 4], &map)?.values;
    let scale = 1.5f64.sqrt(); // of (-1, -1, 0, 2)
    let by_hand = [-1.0 / scale - 1.0, -1.0 / scale + 1.0, 0.0, 2.0 / scale];
    assert!(a.iter().zip(by_hand).all(|(a, b)| (a - b).abs() < 1e-12), "{a:?}");
    Ok(())
}

#[test]
fn the_papers_map_has_no_bounds() -> Result<()> {
    let mut rewards = vec![0.0; 24];
    rewards[0] = 1.0;
    let a = of(&rewards, &[0; 24], &AdvantageMap::FLOW_AWR_PAPER)?;
    let deviation = (23.0f64).sqrt() / 24.0 + 1e-4;
    let w = (1.0 / deviation).exp();
    assert!((a.values[0] - (24.0 * w / (w + 23.0) - 1.0)).abs() < 1e-12 && a.values[0] > 15.0, "{a:?}");
    assert_eq!(a.clipped, 0.0);
    Ok(())
}

/// A failed score takes its group along, whatever the reward counts, and the others are what they are without it.
#[test]
fn a_group_with_a_failed_score_counts_nowhere() -> Result<()> {
    let mut watched = scores("hps", 0.0, &REWARDS);
    watched.scores[2] = Score::Failed;
    for aggregate in [Aggregate::Sum, Aggregate::Normalised] {
        let config = AdvantageMap { aggregate, ..AdvantageMap::FLOW_AWR };
        let all = group_advantages(&[scores("ocr", 1.0, &REWARDS), watched.clone()], &GROUPS, &config)?;
        let alone = of(&REWARDS[4..], &GROUPS[4..], &config)?;
        assert_eq!((&all.values[..4], &all.values[4..]), (&[0.0; 4][..], &alone.values[..]));
        assert_eq!(all.dropped, BTreeSet::from([7]));
        assert_eq!((all.zero_groups, all.rms), (alone.zero_groups, alone.rms));
    }
    watched.scores.fill(Score::Failed);
    let error = group_advantages(&[watched], &GROUPS, &LINEAR).expect_err("no group is left").to_string();
    assert!(error.starts_with("reward hps: no group of this iteration has all its scores"), "{error}");
    Ok(())
}
