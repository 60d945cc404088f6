//! The solvers carry noise to the law whose velocity they are given: a mixture of Gaussians, before and after an
//! exponential tilt, against its moments in closed form and reference values computed apart from this program.

use super::mixture::{Mixture, OLD, TILT, gaussian};
use candle_core::{Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::flow::sde::{Path, SdeConfig, SdeKind, solve_sde};
use flowrl_dist::flow::{Ode, sigmas, solve};
use flowrl_dist::rng::{Purpose, Stream};

/// The law of density proportional to exp(k x0) times the law's: a mixture again.
fn tilted(law: &Mixture) -> Mixture {
    let weight = law.tilted_weights();
    let total: f64 = weight.iter().sum();
    Mixture {
        weight: weight.map(|w| w / total),
        mean: std::array::from_fn(|i| law.mean[i] + TILT * law.variance[i]),
        ..*law
    }
}

/// The quantiles of N(0, 1) at (i + 1/2) / n, `[n, 1, 1, 1]`: a deterministic solver's map of them is a quadrature of the
/// law that it samples, without a sampling error.
fn quantiles(n: usize) -> Result<Tensor> {
    let below = |x: f64| 0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2);
    let quantile = |p: f64| {
        let (mut low, mut high) = (-6.0, 6.0);
        for _ in 0..50 {
            let middle = 0.5 * (low + high);
            if below(middle) < p { low = middle } else { high = middle }
        }
        low
    };
    column((0..n).map(|i| quantile((i as f64 + 0.5) / n as f64)).collect())
}

fn column(values: Vec<f64>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, ((), 1, 1, 1), &Device::Cpu)?)
}

fn values(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

/// The law's velocity as the solvers ask for it.
fn velocity(law: &Mixture) -> impl Fn(&Tensor, f64) -> Result<Tensor> {
    |x, t| column(values(x)?.into_iter().map(|x| law.velocity(t, x)).collect())
}

/// Mean, variance and fourth central moment.
fn moments(x: &Tensor) -> Result<(f64, f64, f64)> {
    let x = values(x)?;
    let mean_of = |f: &dyn Fn(f64) -> f64| x.iter().map(|&x| f(x)).sum::<f64>() / x.len() as f64;
    let mean = mean_of(&|x| x);
    Ok((mean, mean_of(&|x| (x - mean).powi(2)), mean_of(&|x| (x - mean).powi(4))))
}

/// Mean and variance of what a deterministic solver samples.
fn solved(law: &Mixture, solver: Ode, sigmas: &[f64]) -> Result<(f64, f64)> {
    let (mean, variance, _) = moments(&solve(solver, sigmas, &quantiles(20_000)?, velocity(law))?)?;
    Ok((mean, variance))
}

fn uniform(steps: usize) -> Vec<f64> {
    (0..=steps).map(|i| 1.0 - i as f64 / steps as f64).collect()
}

/// Reference values are of 400,000 random samples: three of their standard errors are 0.007 of the mean, 0.012 of the
/// variance.
fn assert_close(what: &str, (mean, variance): (f64, f64), (expected_mean, expected_variance): (f64, f64)) {
    assert!((mean - expected_mean).abs() < 0.005, "{what}: mean {mean}, not {expected_mean}");
    assert!((variance - expected_variance).abs() < 0.01, "{what}: variance {variance}, not {expected_variance}");
}

#[test]
fn the_tilt_is_the_known_mixture() {
    let tilted = tilted(&OLD);
    let close = |a: [f64; 3], b: [f64; 3]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(close(tilted.weight, [0.075960, 0.436932, 0.487108]), "{tilted:?}");
    assert!(close(tilted.mean, [-1.875, 0.58, 2.68]), "{tilted:?}");
}

/// Euler's error halves with the step, so that two numbers of steps extrapolate to the law itself.
#[test]
fn euler_reaches_the_law_of_its_velocity() -> Result<()> {
    let fine = solved(&tilted(&OLD), Ode::Euler, &uniform(500))?;
    assert_close("500 steps to the tilt", fine, (1.4146, 2.154));
    for law in [OLD, tilted(&OLD)] {
        let coarse = solved(&law, Ode::Euler, &uniform(200))?;
        let fine = solved(&law, Ode::Euler, &uniform(400))?;
        let (mean, variance) = law.moments();
        let got = (2.0 * fine.0 - coarse.0, 2.0 * fine.1 - coarse.1);
        assert!((got.0 - mean).abs() < 5e-4 && (got.1 - variance).abs() < 2e-3, "{got:?}, not {:?}", (mean, variance));
    }
    Ok(())
}

/// On the grid of rollouts, ten steps of the second-order solver spread too wide and ten of Euler's too narrow: that is
/// the solvers' own error, not a defect.
#[test]
fn few_steps_have_the_references_discretisation_error() -> Result<()> {
    for (solver, steps, mean, variance) in [
        (Ode::Dpm2, 10, 1.4244, 3.5197),
        (Ode::Dpm2, 20, 1.4181, 2.4614),
        (Ode::Dpm2, 40, 1.4171, 2.2353),
        (Ode::Euler, 10, 1.4359, 1.6199),
        (Ode::Euler, 20, 1.4261, 1.8962),
        (Ode::Euler, 40, 1.4215, 2.0353),
    ] {
        let got = solved(&tilted(&OLD), solver, &sigmas(steps, 3.0))?;
        assert_close(&format!("{solver:?}, {steps} steps"), got, (mean, variance));
    }
    Ok(())
}

const STOCHASTIC: [SdeConfig; 2] = [
    SdeConfig { kind: SdeKind::Flow, noise_level: 0.7, window: None, first: 0, move_every: 0 },
    SdeConfig { kind: SdeKind::Dance, noise_level: 0.5, window: None, first: 0, move_every: 0 },
];

fn stochastic(config: &SdeConfig, sigmas: &[f64], n: usize) -> Result<Path> {
    let normals = |step: usize| {
        let normals = Stream::new(3, Purpose::Rollout, [0, 0, 0, step as u64]).normals(n);
        column(normals.into_iter().map(f64::from).collect())
    };
    solve_sde(config, sigmas, 0..sigmas.len() - 1, &quantiles(n)?, velocity(&OLD), normals)
}

/// The noise rate of kind `flow` grows as 1 / sqrt(1 - t) near pure noise, so that the k-th uniform step from there renews
/// the share a^2 / k of the state however many steps there are: at a = 0.7 that widens a Gaussian of this variance by 1.0 %
/// in 400 steps, and still by 0.6 % in 1600. So its steps grow from 1/13 of their mean length to four times it: their error
/// at the start has faded by the end, and 0.1 % is left. The rate of kind `dance` is bounded: 0.3 % on the uniform grid.
/// A standard error of the sampled variance is 0.5 %.
#[test]
fn stochastic_solvers_keep_the_law() -> Result<()> {
    const STEPS: usize = 800;
    const SAMPLES: usize = 40_000;
    let growing: Vec<f64> = {
        let passed = |i: usize| (4.0 * i as f64 / STEPS as f64).exp_m1() / 4f64.exp_m1();
        (0..=STEPS).map(|i| 1.0 - passed(i)).collect()
    };
    let (mean, variance) = OLD.moments();
    for (config, sigmas) in STOCHASTIC.iter().zip([growing, uniform(STEPS)]) {
        let (got, spread, fourth) = moments(&stochastic(config, &sigmas, SAMPLES)?.x0)?;
        let n = SAMPLES as f64;
        let errors = (got - mean) / (spread / n).sqrt();
        let spread_errors = (spread - variance) / ((fourth - spread * spread) / n).sqrt();
        eprintln!(
            "{:?}: mean {got:.4} ({errors:+.1} standard errors), variance {spread:.4} ({spread_errors:+.1})",
            config.kind
        );
        assert!(errors.abs() < 3.0, "{config:?}: mean {got}, not {mean}");
        assert!(spread_errors.abs() < 3.0, "{config:?}: variance {spread}, not {variance}");
    }
    Ok(())
}

/// The step's law, written down from the stochastic equation itself: `dx = [v + s^2 / (2 t) (x + (1 - t) v)] dt + s dw`.
#[test]
fn log_probabilities_are_those_of_the_step() -> Result<()> {
    let sigmas = sigmas(10, 3.0);
    for config in &STOCHASTIC {
        let path = stochastic(config, &sigmas, 5)?;
        let states = path.states.iter().map(values).collect::<Result<Vec<_>>>()?;
        assert_eq!((states.len(), path.log_probs.len()), (11, 10));
        for (i, log_probs) in path.log_probs.iter().enumerate() {
            let (t, next) = (sigmas[i], sigmas[i + 1]);
            let rate = match config.kind {
                SdeKind::Flow => config.noise_level * (t / (1.0 - if i == 0 { next } else { t })).sqrt(),
                SdeKind::Dance => config.noise_level,
            };
            for ((x, to), got) in states[i].iter().zip(&states[i + 1]).zip(values(log_probs)?) {
                let v = OLD.velocity(t, *x);
                let drift = v + rate * rate / (2.0 * t) * (x + (1.0 - t) * v);
                let expected = gaussian(*to, x + drift * (next - t), rate * rate * (t - next)).ln();
                assert!((got - expected).abs() < 1e-9, "{:?}, step {i}: {got}, not {expected}", config.kind);
            }
        }
    }
    Ok(())
}
