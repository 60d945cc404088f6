//! Each objective against its closed-form gradient, finite differences and limits.

use super::*;
use crate::flow::{column, interpolate};
use crate::rng::{Purpose, Stream};
use candle_core::{Device, Var};

const SHAPE: (usize, usize, usize, usize) = (3, 2, 3, 4);

fn noise(id: u64) -> Result<Tensor> {
    let values = Stream::new(9, Purpose::Parameters, [id, 0, 0, 0]).normals(3 * 2 * 3 * 4);
    Ok(Tensor::from_vec(values, SHAPE, &Device::Cpu)?.to_dtype(DType::F64)?)
}

fn point(advantage: [f64; 3]) -> Result<Point> {
    let (x0, eps) = (noise(1)?, noise(2)?);
    let t = Tensor::new(&[0.2f64, 0.6, 0.95], &Device::Cpu)?;
    let x_t = interpolate(&x0, &eps, &t)?;
    Ok(Point { x0, eps, t, x_t, advantage: Tensor::new(&advantage, &Device::Cpu)? })
}

fn frozen() -> Result<Frozen> {
    Ok(Frozen { old: Some(noise(4)?), reference: Some(noise(5)?) })
}

fn objectives() -> Vec<Objective> {
    let config = |name, gamma| MethodConfig { name, gamma, kl_coef: Some(0.01), adaptive_scale: true };
    [
        config(Method::FlowAwr, None),
        config(Method::AdvantageFlow, Some(Gamma::OneMinusAdvantage)),
        config(Method::AdvantageFlow, Some(Gamma::Constant(1.1))),
    ]
    .iter()
    .map(Objective::new)
    .collect()
}

/// Gradient of the summed losses by autograd.
fn gradient(objective: &Objective, point: &Point, v: &Tensor, frozen: &Frozen) -> Result<Tensor> {
    let v = Var::from_tensor(v)?;
    let loss = objective.terms(point, v.as_tensor(), frozen)?.loss.sum_all()?;
    Ok(loss.backward()?.get(v.as_tensor()).expect("a gradient").clone())
}

fn max_abs(x: &Tensor) -> Result<f64> {
    Ok(x.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?)
}

const A: [f64; 3] = [-0.7, 0.4, 0.9];

/// Derived by hand: with n dimensions and w outside the graph,
/// FlowAWR 2 t^2 (v - v_old - A (u - v_old)) / (n w) + 2 kl (v - v_ref) / n,
/// AdvantageFlow 2 t^2 ((A + gamma + kl) v - A u - gamma v_old - kl v_ref) / (n w).
#[test]
fn gradients_equal_the_closed_forms() -> Result<()> {
    let (point, frozen, v) = (point(A)?, frozen()?, noise(3)?);
    let (old, reference) = (noise(4)?, noise(5)?);
    let u = (&point.eps - &point.x0)?;
    let n = 24.0;
    let a = column(&point.advantage)?;
    let f = x0_estimate(&point.x_t, &point.t, &v)?;
    let w = mean_dims(&(&f - &point.x0)?.abs()?)?;
    let scale = column(&((point.t.sqr()? * (2.0 / n))? / w)?)?;
    for objective in objectives() {
        let expected = match &objective {
            Objective::FlowAwr(o) => {
                let inner = ((&v - &old)? - (&u - &old)?.broadcast_mul(&a)?)?;
                (inner.broadcast_mul(&scale)? + ((&v - &reference)? * (2.0 * o.kl_coef / n))?)?
            }
            Objective::AdvantageFlow(o) => {
                let gamma = match o.gamma {
                    Gamma::OneMinusAdvantage => a.affine(-1.0, 1.0)?,
                    Gamma::Constant(g) => a.affine(0.0, g)?,
                };
                let curvature = ((&a + &gamma)? + o.kl_coef)?;
                let inner = ((v.broadcast_mul(&curvature)? - u.broadcast_mul(&a)?)? - old.broadcast_mul(&gamma)?)?;
                (inner - (&reference * o.kl_coef)?)?.broadcast_mul(&scale)?
            }
        };
        let error = max_abs(&(gradient(&objective, &point, &v, &frozen)? - expected)?)?;
        assert!(error < 1e-14, "{objective:?}: {error}");
    }
    Ok(())
}

#[test]
fn gradients_agree_with_finite_differences_of_the_scaled_loss() -> Result<()> {
    let (point, frozen, v) = (point(A)?, frozen()?, noise(3)?);
    let w = |v: &Tensor| adaptive_scale(&point, &estimate(&point, v)?, true);
    for objective in objectives() {
        let exact = gradient(&objective, &point, &v, &frozen)?.flatten_all()?.to_vec1::<f64>()?;
        for at in [0, 30, 71] {
            let shifted = |by: f64| -> Result<f64> {
                let mut values = v.flatten_all()?.to_vec1::<f64>()?;
                values[at] += by;
                let moved = Tensor::from_vec(values, SHAPE, &Device::Cpu)?;
                let terms = objective.terms(&point, &moved, &frozen)?;
                // The scale is outside the graph: undo its change with v.
                let back = (w(&moved)? / w(&v)?)?;
                let loss = match &objective {
                    Objective::FlowAwr(_) => ((terms.policy * back)? + terms.kl)?,
                    Objective::AdvantageFlow(_) => (terms.loss * back)?,
                };
                Ok(loss.sum_all()?.to_scalar::<f64>()?)
            };
            let numeric = (shifted(1e-5)? - shifted(-1e-5)?) / 2e-5;
            assert!((numeric - exact[at]).abs() < 1e-8, "{objective:?} at {at}: {numeric} {}", exact[at]);
        }
    }
    Ok(())
}

/// A = 0 and v = v_old = v_ref: nothing to learn, and the target is the old estimate to the bit.
#[test]
fn no_signal_gives_no_gradient() -> Result<()> {
    let (point, v) = (point([0.0; 3])?, noise(3)?);
    let frozen = Frozen { old: Some(v.clone()), reference: Some(v.clone()) };
    for objective in objectives() {
        assert_eq!(max_abs(&gradient(&objective, &point, &v, &frozen)?)?, 0.0, "{objective:?}");
    }
    Ok(())
}

/// A = 1 makes FlowAWR and AdvantageFlow(1-A) plain regression to the sample: there, the gradient of v vanishes at u.
#[test]
fn full_advantage_points_at_the_sample() -> Result<()> {
    let point = point([1.0; 3])?;
    let u = (&point.eps - &point.x0)?;
    let v = noise(3)?;
    for name in [Method::FlowAwr, Method::AdvantageFlow] {
        let config = MethodConfig { name, kl_coef: Some(0.0), ..MethodConfig::default() };
        let objective = Objective::new(&config);
        assert!(!objective.needs().reference);
        let frozen = Frozen { old: Some(noise(4)?), reference: None };
        // At u itself the scale takes its floor, so rounding errors are divided by 1e-5.
        assert!(max_abs(&gradient(&objective, &point, &u, &frozen)?)? < 1e-10);
        // Scaling the distance to the sample scales the loss: the adaptive scale is of its size.
        let nearer = (&u + ((&v - &u)? * 0.5)?)?;
        let loss = |v: &Tensor| objective.terms(&point, v, &frozen)?.loss.to_vec1::<f64>().map_err(Into::into);
        let (far, near): (Vec<f64>, Vec<f64>) = (Result::from(loss(&v))?, Result::from(loss(&nearer))?);
        assert!(far.iter().zip(&near).all(|(f, n): (&f64, &f64)| (n / f - 0.5).abs() < 1e-12));
    }
    Ok(())
}

/// AdvantageFlow(1-A) without the base-model term is FlowAWR: same gradients (methods coincide by completing the square).
#[test]
fn advantage_flow_with_one_minus_a_is_flow_awr() -> Result<()> {
    let (point, v) = (point(A)?, noise(3)?);
    let frozen = Frozen { old: Some(noise(4)?), reference: None };
    let of = |name| Objective::new(&MethodConfig { name, kl_coef: Some(0.0), ..MethodConfig::default() });
    let a = gradient(&of(Method::FlowAwr), &point, &v, &frozen)?;
    let b = gradient(&of(Method::AdvantageFlow), &point, &v, &frozen)?;
    assert!(max_abs(&(a - b)?)? < 1e-15);
    Ok(())
}

#[test]
fn gamma_is_written_as_text_or_number() {
    let read = |text: &str| toml::from_str::<MethodConfig>(text).map(|m| m.gamma);
    assert_eq!(read("name = \"advantage-flow\"\ngamma = \"1-A\"").expect("text"), Some(Gamma::OneMinusAdvantage));
    assert_eq!(read("name = \"advantage-flow\"\ngamma = 1.1").expect("number"), Some(Gamma::Constant(1.1)));
    assert!(read("name = \"advantage-flow\"\ngamma = \"A\"").is_err());
}
