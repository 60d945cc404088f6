//! Each objective against its closed-form gradient, finite differences and limits.

mod precision;
mod rollout_steps;

use super::flow_awr::Loss;
use super::*;
use crate::flow::{column, interpolate};
use crate::rng::{Purpose, Stream};
use candle_core::{D, DType, Device, Var};

const SHAPE: (usize, usize, usize, usize) = (3, 2, 3, 4);

fn noise(id: u64) -> Result<Tensor> {
    let values = Stream::new(9, Purpose::Parameters, [id, 0, 0, 0]).normals(3 * 2 * 3 * 4);
    Ok(Tensor::from_vec(values, SHAPE, &Device::Cpu)?.to_dtype(DType::F64)?)
}

fn point(advantage: [f64; 3]) -> Result<Point> {
    let (x0, eps) = (noise(1)?, noise(2)?);
    let t = Tensor::new(&[0.2f64, 0.6, 0.95], &Device::Cpu)?;
    let x_t = interpolate(&x0, &eps, &t)?;
    Ok(Point { t, x_t, advantage: Tensor::new(&advantage, &Device::Cpu)?, target: Target::Forward { x0, eps } })
}

fn u(point: &Point) -> Result<Tensor> {
    let (x0, eps) = point.forward()?;
    Ok((eps - x0)?)
}

/// The composed forms that the objectives' one pass stands for.
fn mean_dims(x: &Tensor) -> Result<Tensor> {
    Ok(x.flatten_from(1)?.mean(D::Minus1)?)
}

fn distance(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    mean_dims(&(a - b)?.sqr()?)
}

fn estimate(point: &Point, v: &Tensor) -> Result<Tensor> {
    Ok((&point.x_t - v.broadcast_mul(&column(&point.t)?)?)?)
}

fn targets() -> Result<TargetVelocities> {
    Ok(TargetVelocities { old: Some(noise(4)?), reference: Some(noise(5)?) })
}

/// An objective whose kind is known.
#[derive(Debug)]
enum Known {
    FlowAwr(flow_awr::FlowAwr),
    AdvantageFlow(advantage_flow::AdvantageFlow),
    DiffusionNft(diffusion_nft::DiffusionNft),
    Awm(awm::Awm),
    Pepg(pepg::Pepg),
}

impl std::ops::Deref for Known {
    type Target = dyn Objective;

    fn deref(&self) -> &Self::Target {
        match self {
            Known::FlowAwr(objective) => objective,
            Known::AdvantageFlow(objective) => objective,
            Known::DiffusionNft(objective) => objective,
            Known::Awm(objective) => objective,
            Known::Pepg(objective) => objective,
        }
    }
}

fn objectives() -> Vec<Known> {
    let kl_coef = 0.01;
    let awr = |loss| Known::FlowAwr(flow_awr::FlowAwr { loss, kl_coef, adaptive: loss != Loss::Velocity });
    let af = |gamma, kl_space| {
        Known::AdvantageFlow(advantage_flow::AdvantageFlow { gamma, kl_coef, kl_space, adaptive: true })
    };
    let nft = |beta, adaptive| Known::DiffusionNft(diffusion_nft::DiffusionNft { beta, clip: 5.0, kl_coef, adaptive });
    vec![
        awr(Loss::Estimate),
        awr(Loss::Velocity),
        awr(Loss::Anchored(Gamma::Constant(1.0))),
        awr(Loss::Anchored(Gamma::Constant(1.1))),
        af(Gamma::OneMinusAdvantage, KlSpace::Velocity),
        af(Gamma::Constant(1.1), KlSpace::Velocity),
        af(Gamma::OneMinusAdvantage, KlSpace::Estimate),
        nft(0.3, true),
        nft(1.0, false),
        Known::Awm(awm::Awm { ratio_clip: 1.0, anchor: 0.5, clip: 5.0, kl_coef }),
        Known::Pepg(pepg::Pepg { advantage_scale: 0.5, kl_coef }),
    ]
}

fn new(config: impl Into<MethodConfig>) -> Box<dyn Objective> {
    let config = config.into();
    config.objective(&config.map())
}

/// Gradient of the summed losses by autograd.
fn gradient(objective: &dyn Objective, point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Tensor> {
    let v = Var::from_tensor(v)?;
    let loss = objective.losses(point, v.as_tensor(), targets)?.loss.sum_all()?;
    Ok(loss.backward()?.get(v.as_tensor()).expect("a gradient").clone())
}

fn max_abs(x: &Tensor) -> Result<f64> {
    Ok(x.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?)
}

const A: [f64; 3] = [-0.7, 0.4, 0.9];

/// The gradient of the summed losses, derived by hand: with n dimensions and w outside the graph,
/// FlowAWR released 2 t^2 (v - v_old - A (u - v_old)) / (n w), paper the same without t^2 / w,
/// AdvantageFlow, and FlowAWR exact (gamma 1) and robust (1.1), 2 t^2 ((A + gamma) v - A u - gamma v_old) / (n w),
/// DiffusionNFT 2 clip t^2 (r (v+ - u) / w+ - (1 - r) (v- - u) / w-) / n,
/// PEPG 2 t^2 e^d (a - d) (v - u) / (n w), with d formed as the two bounds' difference,
/// AWM 2 t A (m + 1e-10)^(-3/4) (v - u) / (clip n) + 2 anchor (v - v_old) / n with m = mean (v - u)^2,
/// and 2 kl (v - v_ref) / n, in AdvantageFlow with estimates times t^2 / w.
fn closed_form(objective: &Known, point: &Point, v: &Tensor, targets: &TargetVelocities) -> Result<Tensor> {
    let (old, reference) = (targets.old()?, targets.reference()?);
    let (x0, u) = (point.forward()?.0, u(point)?);
    let n = 24.0;
    let a = column(&point.advantage)?;
    let scaled = |velocity: &Tensor, factor: f64, adaptive: bool| -> Result<Tensor> {
        let w = match adaptive {
            true => mean_dims(&(estimate(point, velocity)? - x0)?.abs()?)?.maximum(1e-5)?,
            false => point.t.ones_like()?,
        };
        column(&((point.t.sqr()? * factor)? / w)?)
    };
    let toward_reference = |kl_coef: f64| (v - reference)? * (2.0 * kl_coef / n);
    let anchored = |gamma: &Tensor| -> Result<Tensor> {
        let inner = (v.broadcast_mul(&(&a + gamma)?)? - u.broadcast_mul(&a)?)?;
        Ok((inner - old.broadcast_mul(gamma)?)?.broadcast_mul(&scaled(v, 2.0 / n, true)?)?)
    };
    match objective {
        Known::FlowAwr(o) => {
            let target = ((v - old)? - (&u - old)?.broadcast_mul(&a)?)?;
            let policy = match o.loss {
                Loss::Estimate => target.broadcast_mul(&scaled(v, 2.0 / n, true)?)?,
                Loss::Velocity => (target * (2.0 / n))?,
                Loss::Anchored(Gamma::Constant(gamma)) => anchored(&a.affine(0.0, gamma)?)?,
                Loss::Anchored(Gamma::OneMinusAdvantage) => panic!("no variant's default"),
            };
            Ok((policy + toward_reference(o.kl_coef)?)?)
        }
        Known::AdvantageFlow(o) => {
            let gamma = match o.gamma {
                Gamma::OneMinusAdvantage => a.affine(-1.0, 1.0)?,
                Gamma::Constant(g) => a.affine(0.0, g)?,
            };
            let toward = match o.kl_space {
                KlSpace::Velocity => toward_reference(o.kl_coef)?,
                KlSpace::Estimate => ((v - reference)? * o.kl_coef)?.broadcast_mul(&scaled(v, 2.0 / n, true)?)?,
            };
            Ok((anchored(&gamma)? + toward)?)
        }
        Known::DiffusionNft(o) => {
            let r = a.affine(0.5 / o.clip, 0.5)?;
            let positive = ((v * o.beta)? + (old * (1.0 - o.beta))?)?;
            let negative = ((old * (1.0 + o.beta))? - (v * o.beta)?)?;
            let branch = |velocity: &Tensor, r: &Tensor| -> Result<Tensor> {
                let scale = scaled(velocity, 2.0 * o.clip / n, o.adaptive)?;
                Ok((velocity - &u)?.broadcast_mul(r)?.broadcast_mul(&scale)?)
            };
            let policy = (branch(&positive, &r)? - branch(&negative, &r.affine(-1.0, 1.0)?)?)?;
            Ok((policy + toward_reference(o.kl_coef)?)?)
        }
        Known::Awm(o) => {
            let m = (distance(v, &u)? + 1e-10)?;
            let rate = ((m.powf(-0.75)? * &point.t)? * &point.advantage)?;
            let policy = (v - &u)?.broadcast_mul(&column(&(rate * (2.0 / (o.clip * n)))?)?)?;
            Ok(((policy + ((v - old)? * (2.0 * o.anchor / n))?)? + toward_reference(o.kl_coef)?)?)
        }
        Known::Pepg(o) => {
            let rise = pepg_rise(point, v, old)?;
            let factor = (rise.exp()? * ((&point.advantage * o.advantage_scale)? - &rise)?)?;
            let policy = (v - &u)?.broadcast_mul(&scaled(v, 2.0 / n, true)?)?;
            Ok((policy.broadcast_mul(&column(&factor)?)? + toward_reference(o.kl_coef)?)?)
        }
    }
}

/// E - E_old by its definition, `[B]`.
fn pepg_rise(point: &Point, v: &Tensor, old: &Tensor) -> Result<Tensor> {
    let x0 = point.forward()?.0;
    let bound = |v: &Tensor| -> Result<Tensor> {
        let f = estimate(point, v)?;
        Ok((distance(&f, x0)? / mean_dims(&(&f - x0)?.abs()?)?.maximum(1e-5)?)?.neg()?)
    };
    Ok((bound(v)? - bound(old)?)?)
}

#[test]
fn gradients_equal_the_closed_forms() -> Result<()> {
    let (point, targets, v) = (point(A)?, targets()?, noise(3)?);
    for objective in objectives() {
        let expected = closed_form(&objective, &point, &v, &targets)?;
        let error = max_abs(&(gradient(&*objective, &point, &v, &targets)? - expected)?)?;
        assert!(error < 1e-14, "{objective:?}: {error}");
    }
    Ok(())
}

/// Every loss with what stands outside its graph held fixed, differenced. DiffusionNFT, which has two scales, is
/// differenced without them; AWM's ratio, which is 1 wherever it is taken, through its log-likelihood.
#[test]
fn gradients_agree_with_finite_differences() -> Result<()> {
    let (point, targets, v) = (point(A)?, targets()?, noise(3)?);
    let (x0, _) = point.forward()?;
    let w = |v: &Tensor| -> Result<Tensor> { Ok(mean_dims(&(estimate(&point, v)? - x0)?.abs()?)?.maximum(1e-5)?) };
    for objective in objectives() {
        let objective = match objective {
            Known::DiffusionNft(o) => Known::DiffusionNft(diffusion_nft::DiffusionNft { adaptive: false, ..o }),
            other => other,
        };
        let value = |moved: &Tensor| -> Result<f64> {
            let terms = objective.losses(&point, moved, &targets)?;
            let back = (w(moved)? / w(&v)?)?; // undoes the change of the scale with v
            let loss = match &objective {
                Known::FlowAwr(o) if o.adaptive => ((terms.policy * back)? + terms.kl)?,
                Known::AdvantageFlow(o) if o.kl_space == KlSpace::Velocity => ((terms.policy * back)? + terms.kl)?,
                Known::AdvantageFlow(_) => (terms.loss * back)?,
                Known::Awm(o) => {
                    let likelihood = |v: &Tensor| awm::pseudo_log_likelihood(&point, &distance(v, &u(&point)?)?);
                    let difference = (likelihood(moved)? - likelihood(&v)?)?;
                    let a = (&point.advantage / o.clip)?;
                    // The ratio in the loss is 1: put the one to v in its place.
                    ((terms.loss + &a)? - (a * difference.exp()?)?)?
                }
                Known::Pepg(o) => {
                    let factor = |v: &Tensor| -> Result<Tensor> {
                        let rise = pepg_rise(&point, v, targets.old()?)?;
                        Ok((rise.exp()? * ((&point.advantage * o.advantage_scale)? - rise)?)?)
                    };
                    ((((terms.policy * back)? / factor(moved)?)? * factor(&v)?)? + terms.kl)?
                }
                _ => terms.loss,
            };
            Ok(loss.sum_all()?.to_scalar::<f64>()?)
        };
        check_differences(&gradient(&*objective, &point, &v, &targets)?, &v, &format!("{objective:?}"), value)?;
    }
    Ok(())
}

/// Compares a gradient at v with central differences of `value` at three elements.
fn check_differences(gradient: &Tensor, v: &Tensor, what: &str, value: impl Fn(&Tensor) -> Result<f64>) -> Result<()> {
    let exact = gradient.flatten_all()?.to_vec1::<f64>()?;
    for at in [0, 30, 71] {
        let shifted = |by: f64| -> Result<f64> {
            let mut values = v.flatten_all()?.to_vec1::<f64>()?;
            values[at] += by;
            value(&Tensor::from_vec(values, SHAPE, &Device::Cpu)?)
        };
        let numeric = (shifted(1e-5)? - shifted(-1e-5)?) / 2e-5;
        assert!((numeric - exact[at]).abs() < 1e-8, "{what} at {at}: {numeric} {}", exact[at]);
    }
    Ok(())
}

/// The completed square: AdvantageFlow's gradient, all in estimates, is that of (A + gamma + kl) |f - m|^2 with m the weighted mean of x0,
/// f_old and f_ref.
#[test]
fn advantage_flow_is_one_square() -> Result<()> {
    let (point, targets, v) = (point(A)?, targets()?, noise(3)?);
    let (gamma, kl) = (1.1, 0.01);
    let kl_space = Some(KlSpace::Estimate);
    let config = AdvantageFlowConfig { gamma: Gamma::Constant(gamma), kl_coef: kl, kl_space, adaptive_scale: false };
    let a = column(&point.advantage)?;
    let weight = (&a + (gamma + kl))?;
    let (f_old, f_ref) = (estimate(&point, &noise(4)?)?, estimate(&point, &noise(5)?)?);
    let sum = ((point.forward()?.0.broadcast_mul(&a)? + (f_old * gamma)?)? + (f_ref * kl)?)?;
    let centre = sum.broadcast_div(&weight)?;
    let leaf = Var::from_tensor(&v)?;
    let square = (distance(&estimate(&point, leaf.as_tensor())?, &centre)? * weight.flatten_all()?)?.sum_all()?;
    let expected = square.backward()?.get(leaf.as_tensor()).expect("a gradient").clone();
    assert!(max_abs(&(gradient(&*new(config), &point, &v, &targets)? - expected)?)? < 1e-14);
    Ok(())
}

/// Without scales, at the old policy, DiffusionNFT's gradient is 2 A t^2 (v_old - u) / n for every beta.
#[test]
fn diffusion_nft_starts_as_policy_gradient_whatever_its_beta() -> Result<()> {
    let (point, v) = (point(A)?, noise(3)?);
    let targets = TargetVelocities { old: Some(v.clone()), reference: None };
    let u = u(&point)?;
    let scale = column(&((point.t.sqr()? * &point.advantage)? * (2.0 / 24.0))?)?;
    let expected = (&v - u)?.broadcast_mul(&scale)?;
    for nft_beta in [1.0, 0.2, 0.1] {
        let objective = new(DiffusionNftConfig { nft_beta, kl_coef: 0.0, adaptive_scale: false });
        let exact = gradient(&*objective, &point, &v, &targets)?;
        assert!(max_abs(&(&exact - &expected)?)? < 1e-13, "beta {nft_beta}");
        let value = |v: &Tensor| Ok(objective.losses(&point, v, &targets)?.loss.sum_all()?.to_scalar::<f64>()?);
        check_differences(&exact, &v, &format!("beta {nft_beta}"), value)?;
    }
    Ok(())
}

/// A = 1 makes FlowAWR and AdvantageFlow(1-A) plain regression to the sample: there, the gradient of v vanishes at u.
#[test]
fn full_advantage_points_at_the_sample() -> Result<()> {
    let point = point([1.0; 3])?;
    let u = u(&point)?;
    let v = noise(3)?;
    for objective in [
        new(FlowAwrConfig { kl_coef: 0.0, ..Default::default() }),
        new(AdvantageFlowConfig { kl_coef: 0.0, ..Default::default() }),
    ] {
        assert!(!objective.requirements().reference);
        let targets = TargetVelocities { old: Some(noise(4)?), reference: None };
        // At u itself the scale takes its floor, so rounding errors are divided by 1e-5.
        assert!(max_abs(&gradient(&*objective, &point, &u, &targets)?)? < 1e-10);
        // Scaling the distance to the sample scales the loss: the adaptive scale is of its size.
        let nearer = (&u + ((&v - &u)? * 0.5)?)?;
        let loss = |v: &Tensor| objective.losses(&point, v, &targets)?.loss.to_vec1::<f64>().map_err(Into::into);
        let (far, near): (Vec<f64>, Vec<f64>) = (Result::from(loss(&v))?, Result::from(loss(&nearer))?);
        assert!(far.iter().zip(&near).all(|(f, n): (&f64, &f64)| (n / f - 0.5).abs() < 1e-12));
    }
    Ok(())
}

/// AdvantageFlow(1-A) without the base-model term is FlowAWR: same gradients (methods coincide by completing the square).
#[test]
fn advantage_flow_with_one_minus_a_is_flow_awr() -> Result<()> {
    let (point, v) = (point(A)?, noise(3)?);
    let targets = TargetVelocities { old: Some(noise(4)?), reference: None };
    let flow_awr = new(FlowAwrConfig { kl_coef: 0.0, ..Default::default() });
    let advantage_flow = new(AdvantageFlowConfig { kl_coef: 0.0, ..Default::default() });
    let a = gradient(&*flow_awr, &point, &v, &targets)?;
    let b = gradient(&*advantage_flow, &point, &v, &targets)?;
    assert!(max_abs(&(a - b)?)? < 1e-15);
    Ok(())
}

#[test]
fn gamma_is_written_as_text_or_number() {
    let read = |text: &str| toml::from_str::<MethodConfig>(text);
    let of = |gamma| MethodConfig::from(AdvantageFlowConfig { gamma, ..Default::default() });
    assert_eq!(read("name = \"advantage-flow\"\ngamma = \"1-A\"").expect("text"), of(Gamma::OneMinusAdvantage));
    assert_eq!(read("gamma = 1.1\nname = \"advantage-flow\"").expect("number"), of(Gamma::Constant(1.1)));
    assert!(read("name = \"advantage-flow\"\ngamma = \"A\"").is_err());
}

/// What the files of the methods call their keys, which a key of another method's is refused by.
#[test]
fn methods_have_their_keys() {
    use crate::variants::Variants;
    let keys = |name| MethodConfig::keys(name).join(" ");
    let names: Vec<&str> = Method::ALL.iter().map(|method| method.name()).collect();
    assert_eq!(names, ["flow-awr", "advantage-flow", "diffusion-nft", "flow-grpo", "awm", "pepg"]);
    assert_eq!(MethodConfig::NAMES, names);
    assert_eq!(keys("flow-awr"), "variant kl_coef gamma adaptive_scale");
    assert_eq!(keys("advantage-flow"), "gamma kl_coef kl_space adaptive_scale");
    assert_eq!(keys("diffusion-nft"), "nft_beta kl_coef adaptive_scale");
    assert_eq!(keys("flow-grpo"), "ratio_clip kl_coef");
    assert_eq!(keys("awm"), "ratio_clip anchor kl_coef");
    assert_eq!(keys("pepg"), "advantage_scale kl_coef");
    assert_eq!(keys("ppo"), "");
}

/// Every key is written, whichever method, but those that count for nothing; what is written reads back the same.
#[test]
fn a_method_is_written_name_first_and_reads_back() {
    for &kind in Method::ALL {
        let mut method = MethodConfig::of(kind);
        method.resolve();
        let text = toml::to_string(&method).expect("a table");
        assert!(text.starts_with(&format!("name = \"{}\"\n", kind.name())), "{text}");
        assert_eq!(toml::from_str::<MethodConfig>(&text).expect("its own text"), method);
    }
    let mut robust = FlowAwrConfig { variant: Variant::Robust, ..Default::default() };
    robust.resolve();
    assert_eq!((robust.gamma, robust.adaptive_scale), (Some(Gamma::Constant(1.1)), Some(true)));
    let mut paper = FlowAwrConfig { variant: Variant::Paper, ..Default::default() };
    paper.resolve();
    assert_eq!((paper.gamma, paper.adaptive_scale), (None, Some(false)));
    let mut free = AdvantageFlowConfig { kl_coef: 0.0, ..Default::default() };
    free.resolve();
    assert_eq!(free.kl_space, None);
}

/// PEPG stands still, but for the base model, where its bound has risen by a; and to the bit where there is nothing to learn.
#[test]
fn pepg_rests_where_the_bound_has_risen_by_the_advantage() -> Result<()> {
    let (v, old) = (noise(3)?, noise(4)?);
    let targets = TargetVelocities { old: Some(old.clone()), reference: None };
    let objective = pepg::Pepg { advantage_scale: 0.1, kl_coef: 0.0 };
    let rise = pepg_rise(&point(A)?, &v, &old)?.to_vec1::<f64>()?;
    let at_rest = point(std::array::from_fn(|i| rise[i] / 0.1))?;
    assert!(max_abs(&gradient(&objective, &at_rest, &v, &targets)?)? < 1e-15);
    assert_eq!(max_abs(&gradient(&objective, &point([0.0; 3])?, &old, &targets)?)?, 0.0);
    // Short of it, a step against the gradient raises the bound.
    let point = point(std::array::from_fn(|i| rise[i] / 0.1 + 1.0))?;
    let step = (gradient(&objective, &point, &v, &targets)? * 1e-3)?;
    let moved = pepg_rise(&point, &(&v - step)?, &old)?.to_vec1::<f64>()?;
    assert!(moved.iter().zip(&rise).all(|(after, before)| after > before), "{moved:?} {rise:?}");
    Ok(())
}
