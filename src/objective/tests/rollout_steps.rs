//! Flow-GRPO, whose points are steps of rollouts.

use super::*;
use crate::flow::sde::{self, SdeConfig, Step};
use crate::flow::sigmas;

/// A rollout step of the policy v_old, seen from v: the ratio is far enough from 1 to be clipped for some.
pub(super) fn step(advantage: [f64; 3], ratio_clip: f64) -> Result<(Box<dyn Objective>, Point, TargetVelocities)> {
    let sde = SdeConfig::default();
    let grid = sigmas(10, 3.0);
    let steps = [1, 5, 8].map(|i| sde.step(&grid, i));
    let column = |of: fn(&Step) -> f64| Tensor::new(&steps.map(|s| of(&s)), &Device::Cpu);
    let (x, old) = (noise(1)?, noise(4)?);
    let (x_factor, v_factor, std, rate) = (column(|s| s.x)?, column(|s| s.v)?, column(|s| s.std)?, column(|s| s.rate)?);
    let mean = |v: &Tensor| -> Result<Tensor> {
        Ok((x.broadcast_mul(&crate::flow::column(&x_factor)?)? + v.broadcast_mul(&crate::flow::column(&v_factor)?)?)?)
    };
    let next = (mean(&old)? + noise(2)?.broadcast_mul(&crate::flow::column(&std)?)?)?;
    let log_prob = sde::log_prob(&next, &mean(&old)?, &std)?;
    let target = Target::Reverse { next, log_prob, x_factor, v_factor, std, rate };
    let t = Tensor::new(&[grid[1], grid[5], grid[8]], &Device::Cpu)?;
    let point = Point { x_t: x, t, advantage: Tensor::new(&advantage, &Device::Cpu)?, target };
    Ok((
        new(FlowGrpoConfig { ratio_clip, kl_coef: 0.04 }),
        point,
        TargetVelocities { old: None, reference: Some(noise(5)?) },
    ))
}

#[test]
fn flow_grpo_agrees_with_finite_differences_and_with_the_policy_gradient() -> Result<()> {
    // Free of the clip, away from the policy that sampled.
    let (objective, point, targets) = step(A, 10.0)?;
    let v = (noise(4)? + (noise(3)? * 0.05)?)?;
    let value = |v: &Tensor| Ok(objective.losses(&point, v, &targets)?.loss.sum_all()?.to_scalar::<f64>()?);
    check_differences(&gradient(&*objective, &point, &v, &targets)?, &v, "free", value)?;
    // At the policy that sampled, whatever the clip: -A d log p = -A v_factor z / (n std), z the noise of the step.
    let (objective, point, mut targets) = step(A, 1e-4)?;
    let old = noise(4)?;
    targets.reference = Some(old.clone());
    let Target::Reverse { v_factor, std, .. } = &point.target else { panic!("a rollout step") };
    let factor = ((v_factor / std)? * &point.advantage)?;
    let expected = noise(2)?.broadcast_mul(&column(&(factor * (-1.0 / 24.0))?)?)?;
    assert!(max_abs(&(gradient(&*objective, &point, &old, &targets)? - expected)?)? < 1e-12);
    assert!((objective.losses(&point, &old, &targets)?.loss.to_vec1::<f64>()?[0] + A[0]).abs() < 1e-12);
    Ok(())
}

/// Past the clip in the direction that its advantage wants, a sample has no gradient; in the other, it has.
#[test]
fn flow_grpo_stops_at_the_clip() -> Result<()> {
    let (_, point, _) = step(A, 1e-4)?;
    let Target::Reverse { next, x_factor, v_factor, .. } = &point.target else { panic!("a rollout step") };
    // The velocity whose mean is the next state itself: the likeliest, so every ratio is above 1.
    let v = (next - point.x_t.broadcast_mul(&column(x_factor)?)?)?.broadcast_div(&column(v_factor)?)?;
    let near = ((&v * 0.5)? + (noise(4)? * 0.5)?)?;
    let objective = flow_grpo::FlowGrpo { ratio_clip: 1e-4, kl_coef: 0.0 };
    let targets = TargetVelocities { old: None, reference: None };
    let gradients = gradient(&objective, &point, &near, &targets)?.abs()?.flatten_from(1)?.max(1)?.to_vec1::<f64>()?;
    assert!(gradients[0] > 0.0 && gradients[1] == 0.0 && gradients[2] == 0.0, "{gradients:?}");
    Ok(())
}

/// The distance of the means from the base model's, against the formula in numbers.
#[test]
fn flow_grpo_measures_the_base_model_by_the_means() -> Result<()> {
    let (objective, point, targets) = step(A, 1e-4)?;
    let v = noise(3)?;
    let Target::Reverse { v_factor, rate, .. } = &point.target else { panic!("a rollout step") };
    let (v_factor, rate) = (v_factor.to_vec1::<f64>()?, rate.to_vec1::<f64>()?);
    let square = distance(&v, &noise(5)?)?.to_vec1::<f64>()?;
    let kl = objective.losses(&point, &v, &targets)?.kl.to_vec1::<f64>()?;
    for i in 0..3 {
        let expected = 0.04 * v_factor[i] * v_factor[i] * square[i] / (2.0 * rate[i] * rate[i]);
        assert!((kl[i] - expected).abs() < 1e-14, "{} {expected}", kl[i]);
    }
    Ok(())
}
