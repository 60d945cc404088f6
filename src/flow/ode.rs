//! Deterministic solvers.

use crate::error::Result;
use candle_core::Tensor;

/// A deterministic solver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ode {
    /// First order.
    Euler,
    /// Second-order multistep DPM-Solver++ on the x0 estimate (Lu et al., arXiv 2211.01095), as DiffusionNFT samples
    /// (flow_grpo/diffusers_patch/solver.py at 24af555): first and last step of first order.
    Dpm2,
}

/// From noise at `sigmas[0]` `[B, C, H, W]` to the sample at `sigmas[T]`; `velocity(x, t)` is asked T times.
pub fn solve(
    solver: Ode,
    sigmas: &[f64],
    noise: &Tensor,
    mut velocity: impl FnMut(&Tensor, f64) -> Result<Tensor>,
) -> Result<Tensor> {
    let steps = sigmas.len() - 1;
    let mut x = noise.clone();
    let mut previous: Option<Tensor> = None; // the x0 estimate of the step before
    for i in 0..steps {
        let (s, next) = (sigmas[i], sigmas[i + 1]);
        let v = velocity(&x, s)?;
        x = match solver {
            Ode::Euler => (&x + (v * (next - s))?)?,
            Ode::Dpm2 => {
                let m = (&x - (v * s)?)?;
                let stepped = match &previous {
                    Some(before) if i + 1 < steps => {
                        let (a, b, c) = second_order(sigmas[i - 1], s, next);
                        ((&x * a)? + (&m * (b + c))?)? - (before * c)?
                    }
                    // x' = (1 - s') m + s' eps, with eps = (x - (1 - s) m) / s.
                    _ => (&x * (next / s))? + (&m * ((1.0 - next) - next * (1.0 - s) / s))?,
                }?;
                previous = Some(m);
                stepped
            }
        };
    }
    Ok(x)
}

/// Factors (a, b, c) of `x' = a x + b m + c (m - m_before)` from s to s', the step before having started at `before`.
fn second_order(before: f64, s: f64, next: f64) -> (f64, f64, f64) {
    let lambda = |s: f64| ((1.0 - s) / s).ln();
    let h = lambda(next) - lambda(s);
    let b = -(1.0 - next) * (-h).exp_m1();
    // At the second step the one before started at pure noise: its lambda is -inf, the ratio infinite, the term zero.
    let ratio = (lambda(s) - lambda(before)) / h;
    (next / s, b, 0.5 * b / ratio)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    fn scalar(x: f64) -> Result<Tensor> {
        Ok(Tensor::full(x, (1, 1, 1, 1), &Device::Cpu)?)
    }

    fn value(x: &Tensor) -> Result<f64> {
        Ok(x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?[0])
    }

    /// For data that is one Gaussian N(m, s2) the velocity is linear in x and the flow is known:
    /// x_t = (1-t) m + sqrt((1-t)^2 s2 + t^2) z.
    fn error(solver: Ode, steps: usize) -> Result<f64> {
        let (m, s2, z) = (0.7, 0.25, 1.3);
        let sigmas: Vec<f64> = (0..=steps).map(|i| 1.0 - i as f64 / steps as f64).collect();
        let x = solve(solver, &sigmas, &scalar(z)?, |x, t| {
            let factor = (t - (1.0 - t) * s2) / ((1.0 - t) * (1.0 - t) * s2 + t * t);
            Ok(((x - (1.0 - t) * m)? * factor)?.affine(1.0, -m)?)
        })?;
        Ok((value(&x)? - (m + s2.sqrt() * z)).abs())
    }

    #[test]
    fn solvers_converge_at_their_order() -> Result<()> {
        assert!(error(Ode::Euler, 200)? < 0.6 * error(Ode::Euler, 100)?);
        assert!(error(Ode::Euler, 400)? < 5e-3);
        assert!(error(Ode::Dpm2, 400)? < 5e-4);
        assert!(error(Ode::Dpm2, 10)? < error(Ode::Euler, 10)?);
        Ok(())
    }

    #[test]
    fn second_step_is_finite_and_of_first_order() -> Result<()> {
        let (_, _, c) = second_order(1.0, 0.9, 0.8);
        assert_eq!(c, 0.0);
        Ok(())
    }
}
