//! Gradients in f32 where rounding could be all that they are.

use super::rollout_steps::step;
use super::*;

/// A point and its velocities in f32, and the same numbers in f64.
fn in_both(point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<[(Point, Tensor, TargetVelocities); 2]> {
    let to = |dtype: DType| -> Result<_> {
        let cast = |x: &Tensor| Ok::<_, Error>(x.to_dtype(DType::F32)?.to_dtype(dtype)?);
        let target = match &point.target {
            Target::Forward { x0, eps } => Target::Forward { x0: cast(x0)?, eps: cast(eps)? },
            Target::Reverse { next, log_prob, x_factor, v_factor, std, rate } => Target::Reverse {
                next: cast(next)?,
                log_prob: cast(log_prob)?,
                x_factor: cast(x_factor)?,
                v_factor: cast(v_factor)?,
                std: cast(std)?,
                rate: cast(rate)?,
            },
        };
        let t = cast(&point.t)?;
        let x_t = match &target {
            Target::Forward { x0, eps } => interpolate(x0, eps, &t)?,
            Target::Reverse { .. } => cast(&point.x_t)?,
        };
        let targets = TargetVelocities {
            old: targets.old.as_ref().map(cast).transpose()?,
            reference: targets.reference.as_ref().map(cast).transpose()?,
        };
        Ok((Point { x_t, t, advantage: cast(&point.advantage)?, target }, cast(v)?, targets))
    };
    Ok([to(DType::F32)?, to(DType::F64)?])
}

/// Where the policies and the base model nearly agree and the reward says little or nothing, f32 gradients have all the
/// digits that the same numbers have in f64.
#[test]
fn close_to_the_old_policy_no_digits_are_lost() -> Result<()> {
    let mut worst: f64 = 0.0;
    for apart in [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6] {
        for advantage in [[0.0; 3], [0.0, apart, -apart], A] {
            let point = point(advantage)?;
            let near = |id: u64| -> Result<Tensor> { Ok((noise(4)? + (noise(id)? * apart)?)?) };
            let targets = TargetVelocities { old: Some(noise(4)?), reference: Some(near(5)?) };
            let [(near_point, v, near_targets), (exact_point, exact_v, exact_targets)] =
                in_both(&point, &near(3)?, &targets)?;
            for objective in objectives() {
                let expected = closed_form(&objective, &exact_point, &exact_v, &exact_targets)?;
                let found = gradient(&*objective, &near_point, &v, &near_targets)?.to_dtype(DType::F64)?;
                let error = max_abs(&(found - &expected)?)? / max_abs(&expected)?;
                assert!(error < 2e-6, "{objective:?}, {apart} apart, {advantage:?}: {error}");
                worst = worst.max(error);
            }
        }
    }
    // Flow-GRPO, at a policy near the one that sampled and free of the clip.
    let (objective, point, targets) = step(A, 10.0)?;
    let near = (noise(4)? + (noise(3)? * 0.05)?)?;
    let [found, exact] = in_both(&point, &near, &targets)?.map(|(point, v, targets)| {
        gradient(&*objective, &point, &v, &targets)?.to_dtype(DType::F64).map_err(Error::from)
    });
    let (found, exact) = (found?, exact?);
    assert!(max_abs(&(found - &exact)?)? < 1e-5 * max_abs(&exact)?);
    eprintln!("off by {worst:.1e} of the largest element, at worst");
    Ok(())
}

/// A = 0 and v = v_old = v_ref: nothing to learn, to the bit, beside samples that have a signal too.
#[test]
fn no_signal_gives_no_gradient() -> Result<()> {
    let v = noise(3)?;
    let targets = TargetVelocities { old: Some(v.clone()), reference: Some(v.clone()) };
    let silent = |objective: &dyn Objective, point: &Point| -> Result<()> {
        for (point, v, targets) in in_both(point, &v, &targets)? {
            let rows =
                gradient(objective, &point, &v, &targets)?.flatten_from(1)?.abs()?.max(1)?.to_dtype(DType::F64)?;
            let [first, second, third] = rows.to_vec1::<f64>()?[..] else { panic!("three samples") };
            assert!(first == 0.0 && second > 0.0 && third == 0.0, "{objective:?}: {rows}");
        }
        Ok(())
    };
    for objective in objectives() {
        silent(&*objective, &point([0.0, 0.4, -0.0])?)?;
    }
    let (objective, point, _) = step([0.0, 0.4, -0.0], 10.0)?;
    silent(&*objective, &point)
}
