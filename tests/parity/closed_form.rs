//! What the objectives converge to, against closed forms on a one-dimensional mixture of Gaussians.
//!
//! The old policy's law is sum pi_i N(m_i, s_i^2), the reward is x0, and the exact optimum is the exponential tilt
//! w = exp(k x0) / Z. At given (t, x_t) the posterior of x0 is integrated by quadrature; each loss is quadratic in the
//! policy's velocity, so two gradients of the program's own loss give its minimiser. The golden numbers were computed
//! apart from this program.

use super::mixture::{OLD, TILT, gaussian};
use candle_core::{Device, Tensor, Var};
use flowrl_dist::advantage::{AdvantageMap, Scores, group_advantages};
use flowrl_dist::objective::{
    AdvantageFlowConfig, DiffusionNftConfig, FlowAwrConfig, Gamma, MethodSpec, Objective, Point, Target,
    TargetVelocities, Variant,
};
use flowrl_dist::rng::{Purpose, Stream};
use std::collections::BTreeMap;

type Result<T> = candle_core::Result<T>;

fn density(x0: f64) -> f64 {
    (0..3).map(|i| OLD.weight[i] * gaussian(x0, OLD.mean[i], OLD.variance[i])).sum()
}

fn exponential(x0: f64) -> f64 {
    (TILT * x0).exp() / OLD.tilted_weights().iter().sum::<f64>() - 1.0
}

fn linear(x0: f64) -> f64 {
    let (mean, variance) = OLD.moments();
    ((x0 - mean) / variance.sqrt()).clamp(-1.0, 1.0)
}

fn linear_within_five(x0: f64) -> f64 {
    let (mean, variance) = OLD.moments();
    ((x0 - mean) / variance.sqrt()).clamp(-5.0, 5.0)
}

/// The posterior of x0 at (t, x_t): places and weights that sum to 1.
fn posterior(t: f64, x_t: f64) -> (Vec<f64>, Vec<f64>) {
    let places: Vec<f64> = (0..=36_000).map(|i| -9.0 + i as f64 * 5e-4).collect();
    let weights: Vec<f64> = places.iter().map(|&x0| density(x0) * gaussian(x_t, (1.0 - t) * x0, t * t)).collect();
    let sum: f64 = weights.iter().sum();
    (places, weights.into_iter().map(|w| w / sum).collect())
}

/// The velocity that minimises the posterior mean of the objective's loss.
fn minimiser(objective: &dyn Objective, advantage: fn(f64) -> f64, t: f64, x_t: f64) -> Result<f64> {
    let (places, weights) = posterior(t, x_t);
    let n = places.len();
    let column = |values: Vec<f64>| Tensor::from_vec(values, (n, 1, 1, 1), &Device::Cpu);
    let constant = |value: f64| Tensor::full(value, (n, 1, 1, 1), &Device::Cpu);
    let point = Point {
        target: Target::Forward {
            x0: column(places.clone())?,
            eps: column(places.iter().map(|x0| (x_t - (1.0 - t) * x0) / t).collect())?,
        },
        t: Tensor::full(t, n, &Device::Cpu)?,
        x_t: constant(x_t)?,
        advantage: Tensor::from_vec(places.iter().map(|&x0| advantage(x0)).collect(), n, &Device::Cpu)?,
    };
    let frozen = TargetVelocities { old: Some(constant(OLD.velocity(t, x_t))?), reference: None };
    let weights = Tensor::from_vec(weights, n, &Device::Cpu)?;
    let gradient = |v: f64| -> Result<f64> {
        let v = Var::new(v, &Device::Cpu)?;
        let all = v.broadcast_as((n, 1, 1, 1))?;
        let terms = objective.losses(&point, &all, &frozen).map_err(candle_core::Error::wrap)?;
        let grads = (terms.loss * &weights)?.sum_all()?.backward()?;
        grads.get(v.as_tensor()).expect("a gradient").to_scalar()
    };
    let (at_zero, at_one) = (gradient(0.0)?, gradient(1.0)?);
    Ok(-at_zero / (at_one - at_zero))
}

fn flow_awr(variant: Variant) -> Box<dyn Objective> {
    with(FlowAwrConfig { variant, kl_coef: 0.0, gamma: None, adaptive_scale: Some(false) })
}

fn advantage_flow(gamma: Gamma) -> Box<dyn Objective> {
    with(AdvantageFlowConfig { gamma, kl_coef: 0.0, kl_space: None, adaptive_scale: false })
}

fn diffusion_nft(nft_beta: f64) -> Box<dyn Objective> {
    with(DiffusionNftConfig { nft_beta, kl_coef: 0.0, adaptive_scale: false })
}

fn with(config: impl MethodSpec) -> Box<dyn Objective> {
    config.objective(&config.map())
}

/// t, x_t, v_old, v*, h, then the minimisers: FlowAWR, AdvantageFlow(1.1), AdvantageFlow(1-A), DiffusionNFT with mix 1
/// and 0.1.
const GOLDEN: [[f64; 10]; 9] = [
    [0.25, -1.5, 1.999922, 1.846025, 0.247783, 1.961789, 1.926269, 1.992354, 1.963001, 1.630711],
    [0.25, 0.0, -0.810046, -0.945030, 0.744440, -0.910534, -0.953987, -0.972915, -0.842620, -1.135785],
    [0.25, 1.5, -2.285698, -2.508574, 1.905944, -2.710487, -2.325103, -2.367287, -2.341162, -2.840339],
    [0.50, -1.5, 1.342391, 1.033357, 0.233615, 1.270196, 0.762699, 1.273259, 1.279463, 0.713116],
    [0.50, 0.0, -0.510666, -1.052894, 0.813899, -0.951985, -1.093938, -1.195100, -0.665670, -2.060706],
    [0.50, 1.5, -1.666837, -2.252599, 2.314563, -3.022620, -1.832064, -1.996660, -1.832133, -3.319788],
    [0.75, -1.5, -0.243730, -1.657221, 0.444389, -0.871869, -2.290638, -1.212404, -0.523119, -3.037620],
    [0.75, 0.0, -0.175047, -1.588169, 0.936501, -1.498437, -1.401193, -1.531534, -0.543851, -3.863085],
    [0.75, 1.5, 0.005409, -1.001174, 1.719992, -1.725906, -0.504399, -0.845040, -0.275047, -2.799156],
];

#[test]
fn minimisers_are_those_of_the_closed_forms() -> Result<()> {
    let released = flow_awr(Variant::Released);
    let constant = advantage_flow(Gamma::Constant(1.1));
    let one_minus = advantage_flow(Gamma::OneMinusAdvantage);
    let exact = advantage_flow(Gamma::Constant(1.0));
    let (paper, exact_variant, robust) =
        (flow_awr(Variant::Paper), flow_awr(Variant::Exact), flow_awr(Variant::Robust));
    let mut worst = BTreeMap::<String, f64>::new();
    for [t, x_t, v_old, v_star, h, awr, af_constant, af_one_minus, nft, nft_small] in GOLDEN {
        let mut close = |what: &str, got: f64, expected: f64| {
            assert!((got - expected).abs() < 1e-6, "{what} at t {t}, x_t {x_t}: {got}, not {expected}");
            let worst = worst.entry(what.to_owned()).or_default();
            *worst = worst.max((got - expected).abs());
        };
        close("v_old", OLD.velocity(t, x_t), v_old);
        close("FlowAWR", minimiser(&*released, exponential, t, x_t)?, awr);
        // The direction is exact, the step is longer by the density ratio h: not v*.
        close("v_old + h (v* - v_old)", v_old + h * (v_star - v_old), awr);
        close("AdvantageFlow(1.1)", minimiser(&*constant, linear, t, x_t)?, af_constant);
        close("AdvantageFlow(1-A)", minimiser(&*one_minus, linear, t, x_t)?, af_one_minus);
        close("DiffusionNFT(1)", minimiser(&*diffusion_nft(1.0), linear_within_five, t, x_t)?, nft);
        close("DiffusionNFT(0.1)", minimiser(&*diffusion_nft(0.1), linear_within_five, t, x_t)?, nft_small);
        // gamma = 1 with the exponential advantage has exactly the tilt's velocity as its minimiser.
        close("AdvantageFlow(1), A = w - 1", minimiser(&*exact, exponential, t, x_t)?, v_star);
        close("FlowAWR, paper", minimiser(&*paper, exponential, t, x_t)?, awr);
        close("FlowAWR, exact", minimiser(&*exact_variant, exponential, t, x_t)?, v_star);
        // gamma = 1.1: the tilt (0.1 + w) / 1.1, so v* where h is large and v_old where it is small.
        close("FlowAWR, robust", minimiser(&*robust, exponential, t, x_t)?, (0.1 * v_old + h * v_star) / (0.1 + h));
    }
    worst.iter().for_each(|(what, error)| eprintln!("{what}: {error:.1e} from the golden value, at worst"));
    Ok(())
}

/// A constant advantage says nothing: the minimiser is the old velocity, because it is the posterior mean of u.
#[test]
fn a_constant_advantage_changes_nothing() -> Result<()> {
    for objective in [flow_awr(Variant::Released), advantage_flow(Gamma::Constant(1.1))] {
        for x_t in [-1.5, 0.0, 1.5] {
            let got = minimiser(&*objective, |_| 0.7, 0.5, x_t)?;
            assert!((got - OLD.velocity(0.5, x_t)).abs() < 1e-9, "{objective:?} at {x_t}: {got}");
        }
    }
    // DiffusionNFT's constant that says nothing is r = 1/2.
    for x_t in [-1.5, 0.0, 1.5] {
        let got = minimiser(&*diffusion_nft(0.1), |_| 0.0, 0.5, x_t)?;
        assert!((got - OLD.velocity(0.5, x_t)).abs() < 1e-9, "DiffusionNFT at {x_t}: {got}");
    }
    Ok(())
}

/// Groups of 24 in the place of the law's own normaliser bias FlowAWR's minimiser by O(1/K), as was computed apart from
/// this program; where the tilt puts much mass, by far more than the error of these samples.
#[test]
fn groups_in_the_place_of_the_law_have_their_known_bias() -> flowrl_dist::Result<()> {
    const K: usize = 24;
    const GROUPS: usize = 20_000;
    let x0: Vec<f64> = (0..K * GROUPS)
        .map(|i| {
            let stream = Stream::new(3, Purpose::Parameters, [i as u64, 0, 0, 0]);
            let part = match stream.uniform(100) {
                u if u < OLD.weight[0] => 0,
                u if u < OLD.weight[0] + OLD.weight[1] => 1,
                _ => 2,
            };
            OLD.mean[part] + OLD.variance[part].sqrt() * f64::from(stream.normals(1)[0])
        })
        .collect();
    let groups: Vec<usize> = (0..x0.len()).map(|i| i / K).collect();
    let rewards = [Scores::new("x0", 1.0, x0.iter().copied())];
    // a / temperature = k x0 + constant: the map's scale is the deviation of all rewards.
    let (_, variance) = OLD.moments();
    let map = AdvantageMap { temperature: 1.0 / (TILT * variance.sqrt()), ..AdvantageMap::FLOW_AWR_PAPER };
    let advantages = group_advantages(&rewards, &groups, &map)?.values;
    let (t, law) = (0.5, [1.270196, -0.951985, -3.022620]);
    for ((x_t, expected), law) in [(-1.5, 1.2657), (0.0, -0.9514), (1.5, -2.8678)].into_iter().zip(law) {
        let v_old = OLD.velocity(t, x_t);
        let (mut sum, mut total) = (0.0, 0.0);
        for (x0, a) in x0.iter().zip(&advantages) {
            let weight = gaussian(x_t, (1.0 - t) * x0, t * t);
            sum += weight * a * ((x_t - x0) / t - v_old);
            total += weight;
        }
        let got = v_old + sum / total;
        eprintln!("at {x_t}: {got:.4}, expected {expected}, with the law's normaliser {law}");
        assert!((got - expected).abs() < 0.02, "at {x_t}: {got}, not {expected}");
    }
    Ok(())
}

/// AdvantageFlow's minimiser is the velocity of the tilt q = (gamma + A) / (gamma + mean A) times the old law:
/// (E[A u] + gamma v_old) / (E[A] + gamma) under the posterior, whatever the advantage.
#[test]
fn advantage_flow_has_the_velocity_of_the_tilted_law_as_its_minimiser() -> Result<()> {
    const GAMMA: f64 = 1.1;
    let objective = advantage_flow(Gamma::Constant(GAMMA));
    for advantage in [linear, exponential, |x0: f64| 0.9 * x0.sin()] {
        for [t, x_t, ..] in GOLDEN {
            let (places, weights) = posterior(t, x_t);
            let mean = |f: &dyn Fn(f64) -> f64| places.iter().zip(&weights).map(|(&x0, w)| w * f(x0)).sum::<f64>();
            let advantage_of_u = mean(&|x0| advantage(x0) * (x_t - x0) / t);
            let expected = (advantage_of_u + GAMMA * OLD.velocity(t, x_t)) / (mean(&advantage) + GAMMA);
            let got = minimiser(&*objective, advantage, t, x_t)?;
            assert!((got - expected).abs() < 1e-6, "t {t}, x_t {x_t}: {got}, not {expected}");
        }
    }
    Ok(())
}
