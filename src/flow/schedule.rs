//! The times at which a solver evaluates the model.

use super::Solver;
use serde::{Deserialize, Serialize};

/// How images are sampled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerConfig {
    /// The solver.
    pub solver: Solver,
    /// Solver steps T.
    pub steps: usize,
    /// Timestep shift of the grid (3 for SD3.5 at 512 px, 1 for none).
    pub shift: f64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self { solver: Solver::Dpm2, steps: 10, shift: 3.0 }
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
}
