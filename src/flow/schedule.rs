//! The times at which a solver evaluates the model.

use super::sde::SdeConfig;
use serde::{Deserialize, Serialize};

/// A solver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Solver {
    /// [`super::Ode::Euler`].
    Euler,
    /// [`super::Ode::Dpm2`].
    Dpm2,
    /// Stochastic, see [`super::sde`].
    Sde,
}

/// The timestep shift where neither the configuration nor the model says one: that of Stable Diffusion 3.5.
pub const DEFAULT_SHIFT: f64 = 3.0;

/// `[sampler]`: how the images to train on are sampled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerConfig {
    /// "dpm2": DPM-Solver++ of second order (2211.01095); "euler": first order; "sde": stochastic.
    pub solver: Solver,
    /// Solver steps (T), one model evaluation each.
    pub steps: usize,
    /// Timestep shift of the grid, 1 for none; left out: the model's own, of
    /// scheduler/scheduler_config.json in its folder, or 3 where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shift: Option<f64>,
    /// Classifier-free guidance of the rollouts, `v_negative + guidance (v_prompt - v_negative)`;
    /// 1: none. Rollout steps are trained with it too.
    pub guidance: f64,
    /// Tells the model whole thousandths of the time while sampling, rounded down, as
    /// DiffusionNFT's program; training tells it the exact time.
    pub truncate_time: bool,
    /// The stochastic solver's own keys.
    pub sde: SdeConfig,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self {
            solver: Solver::Dpm2,
            steps: 10,
            shift: None,
            guidance: 1.0,
            truncate_time: false,
            sde: SdeConfig::default(),
        }
    }
}

impl SamplerConfig {
    /// The T + 1 times.
    pub fn sigmas(&self) -> Vec<f64> {
        sigmas(self.steps, self.shift())
    }

    /// The timestep shift of the grid; a run's configuration says it once it is read.
    pub fn shift(&self) -> f64 {
        self.shift.unwrap_or(DEFAULT_SHIFT)
    }

    /// Whether guidance leads away from anything.
    pub fn is_guided(&self) -> bool {
        self.guidance != 1.0
    }

    /// The time that the model is told at time `t` of the grid.
    pub fn model_time(&self, t: f64) -> f64 {
        match self.truncate_time {
            true => (1000.0 * t).floor() / 1000.0,
            false => t,
        }
    }
}

/// The T + 1 times of a rollout, from 1 (noise) to 0, in f64.
///
/// The shift `s(x) = shift x / (1 + (shift - 1) x)` is applied twice, to the smallest time 1/1000 and to the grid, as
/// diffusers' `FlowMatchEulerDiscreteScheduler` does (scheduling_flow_match_euler_discrete.py, v0.33.1).
pub fn sigmas(steps: usize, shift: f64) -> Vec<f64> {
    let shifted = |x: f64| shift * x / (1.0 + (shift - 1.0) * x);
    let smallest = shifted(1e-3);
    let grid = |i: usize| match steps {
        1 => 1.0,
        _ => 1.0 + (smallest - 1.0) * i as f64 / (steps - 1) as f64,
    };
    (0..steps).map(|i| shifted(grid(i))).chain([0.0]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// diffusers 0.33.1 and 0.42.1, shift 3, 10 steps; the four-step grid is quoted in FlowAWR's program.
    #[test]
    fn grid_is_that_of_diffusers() {
        let ten =
            [1.000000, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0.0];
        assert!(sigmas(10, 3.0).iter().zip(ten).all(|(a, b)| (a - b).abs() < 5e-7));
        let four = [1.0, 0.8577, 0.6022, 0.0089, 0.0];
        assert!(sigmas(4, 3.0).iter().zip(four).all(|(a, b)| (a - b).abs() < 5e-5));
        assert_eq!(sigmas(1, 3.0), [1.0, 0.0]);
    }

    #[test]
    fn time_is_truncated_on_request() {
        let exact = SamplerConfig::default();
        let truncated = SamplerConfig { truncate_time: true, ..exact.clone() };
        let model_times =
            |config: &SamplerConfig| config.sigmas()[..4].iter().map(|&t| config.model_time(t)).collect::<Vec<_>>();
        assert_eq!(model_times(&truncated), [1.0, 0.960, 0.913, 0.857]);
        assert_eq!(model_times(&exact), exact.sigmas()[..4]);
    }
}
