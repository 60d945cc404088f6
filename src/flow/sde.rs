//! Stochastic solvers, whose steps have a probability: what policy-gradient methods sample with.
//!
//! The rectified flow `dx = v dt` and, for every noise rate s(t), the equation
//! `dx = [v + s^2 / (2 t) (x + (1 - t) v)] dt + s dw` have the same marginals (Flow-GRPO, arXiv 2505.05470, section 4.1);
//! a step from t to t' is its Euler-Maruyama step, a Gaussian.

use super::column;
use crate::error::Result;
use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The noise rate s(t) of level a.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SdeKind {
    /// `a sqrt(t / (1 - t))` (Flow-GRPO, sd3_sde_with_logprob.py at ac4c86e).
    Flow,
    /// a, the same at every time (DanceGRPO, fastvideo/train_grpo_flux.py at 15cc71d).
    Dance,
}

/// `[sampler.sde]`: counts if a solver is "sde".
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SdeConfig {
    /// Noise rate: "flow": noise_level sqrt(t / (1 - t)) (Flow-GRPO); "dance": noise_level.
    pub kind: SdeKind,
    /// Its level (Flow-GRPO: 0.7; DanceGRPO: 0.3).
    pub noise_level: f64,
    /// Steps that are stochastic and can be trained, the others are Euler's; left out: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// The first stochastic step, counted from 0.
    pub first: usize,
    /// Iterations after which the window moves on by a step (MixGRPO, 2507.21802: 25); 0: it stays.
    pub move_every: u64,
}

impl Default for SdeConfig {
    fn default() -> Self {
        Self { kind: SdeKind::Flow, noise_level: 0.7, window: None, first: 0, move_every: 0 }
    }
}

impl SdeConfig {
    /// How many of `steps` steps are stochastic. Configuration has made sure that `first + len <= steps`.
    pub fn count(&self, steps: usize) -> usize {
        self.window.unwrap_or(steps.saturating_sub(self.first))
    }

    /// The stochastic steps of an iteration, of a grid that has room for them: the window moves from `first` to the last place it fits, then starts over.
    pub fn window(&self, steps: usize, iteration: u64) -> Range<usize> {
        let len = self.count(steps);
        let places = (steps - self.first - len) as u64 + 1;
        let start = self.first + (iteration.checked_div(self.move_every).unwrap_or(0) % places) as usize;
        start..start + len
    }

    /// Step `i` of the grid.
    pub fn step(&self, sigmas: &[f64], i: usize) -> Step {
        let (t, next) = (sigmas[i], sigmas[i + 1]);
        let rate = match self.kind {
            SdeKind::Dance => self.noise_level,
            SdeKind::Flow => {
                // At pure noise the rate is infinite: there the next time stands in, as in the released program.
                let finite = if t == 1.0 { next } else { t };
                self.noise_level * (t / (1.0 - finite)).sqrt()
            }
        };
        let (dt, half) = (next - t, rate * rate / (2.0 * t));
        Step { x: 1.0 + half * dt, v: (1.0 + half * (1.0 - t)) * dt, std: rate * (-dt).sqrt(), rate }
    }
}

/// One stochastic step: the next state is normal around `x * state + v * velocity`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Factor of the state.
    pub x: f64,
    /// Factor of the velocity.
    pub v: f64,
    /// Standard deviation of the next state.
    pub std: f64,
    /// The noise rate s(t), `std / sqrt(t - t')`.
    pub rate: f64,
}

/// Log-density of `next` under a normal of `mean` (both `[B, C, H, W]`) and `std` `[B]`, the mean over dimensions: `[B]`.
///
/// The mean, not the sum: the ratio of two policies is that of one average dimension (Flow-GRPO, as above).
pub fn log_prob(next: &Tensor, mean: &Tensor, std: &Tensor) -> Result<Tensor> {
    let standard = (next - mean)?.broadcast_div(&column(std)?)?; // [B, C, H, W]
    let square = standard.sqr()?.flatten_from(1)?.mean(D::Minus1)?; // [B]
    let constant = 0.5 * (2.0 * std::f64::consts::PI).ln();
    Ok(((square * -0.5)? - std.log()?)?.affine(1.0, -constant)?)
}

/// What a stochastic solver did.
pub struct Path {
    /// The sample, `[B, C, H, W]`.
    pub x0: Tensor,
    /// The states before each stochastic step and after the last one.
    pub states: Vec<Tensor>,
    /// [`log_prob`] of each stochastic step, `[B]`.
    pub log_probs: Vec<Tensor>,
}

/// From noise at `sigmas[0]` `[B, C, H, W]` to the sample at `sigmas[T]`: stochastic in `window`, Euler steps elsewhere.
/// `velocity(x, t)` is asked T times, `normals(i)` for the noise of each stochastic step.
pub fn solve_sde(
    config: &SdeConfig,
    sigmas: &[f64],
    window: Range<usize>,
    noise: &Tensor,
    mut velocity: impl FnMut(&Tensor, f64) -> Result<Tensor>,
    mut normals: impl FnMut(usize) -> Result<Tensor>,
) -> Result<Path> {
    let mut x = noise.clone();
    let (mut states, mut log_probs) = (Vec::new(), Vec::new());
    for i in 0..sigmas.len() - 1 {
        let v = velocity(&x, sigmas[i])?;
        if !window.contains(&i) {
            x = (&x + (v * (sigmas[i + 1] - sigmas[i]))?)?;
            continue;
        }
        let step = config.step(sigmas, i);
        let mean = ((&x * step.x)? + (v * step.v)?)?;
        let next = (&mean + (normals(i)? * step.std)?)?;
        let std = Tensor::full(step.std, x.dim(0)?, x.device())?.to_dtype(x.dtype())?;
        log_probs.push(log_prob(&next, &mean, &std)?);
        if states.is_empty() {
            states.push(x);
        }
        states.push(next.clone());
        x = next;
    }
    Ok(Path { x0: x, states, log_probs })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::sigmas;

    #[test]
    fn the_window_moves_and_starts_over() {
        let config = SdeConfig { window: Some(4), move_every: 25, ..SdeConfig::default() };
        assert_eq!([0, 24, 25, 149, 150, 175].map(|it| config.window(10, it).start), [0, 0, 1, 5, 6, 0]);
        assert_eq!(config.window(10, 150), 6..10);
        assert_eq!(SdeConfig::default().window(10, 99), 0..10);
        assert_eq!(SdeConfig { first: 2, window: Some(3), ..SdeConfig::default() }.window(10, 7), 2..5);
    }

    /// The two kinds differ in the rate alone: where the rates agree, so do the steps.
    #[test]
    fn kinds_agree_where_their_rates_do() {
        let sigmas = sigmas(10, 3.0);
        let flow = SdeConfig { noise_level: 0.7, ..SdeConfig::default() };
        for i in 0..10 {
            let step = flow.step(&sigmas, i);
            let dance = SdeConfig { kind: SdeKind::Dance, noise_level: step.rate, ..SdeConfig::default() };
            assert_eq!(dance.step(&sigmas, i), step);
        }
    }

    /// DanceGRPO's own words: mu = x + dt v - dt/2 eta^2 score, score = -(x - (1 - t) x0) / t^2, x0 = x - t v.
    #[test]
    fn the_dance_step_follows_the_score() {
        let (t, next, eta, x, v) = (0.6, 0.45, 0.3, 0.8, -1.7);
        let score = -(x - (1.0 - t) * (x - t * v)) / (t * t);
        let expected = x + (next - t) * v - 0.5 * eta * eta * score * (next - t);
        let dance = SdeConfig { kind: SdeKind::Dance, noise_level: eta, ..SdeConfig::default() };
        let step = dance.step(&[t, next], 0);
        assert!((step.x * x + step.v * v - expected).abs() < 1e-15, "{step:?}");
        assert!((step.std - eta * (t - next).sqrt()).abs() < 1e-15);
    }
}
