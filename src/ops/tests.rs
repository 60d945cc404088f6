//! Each operation against the composed form (value and gradients) and against finite differences in f64.

use super::bf16x3::{Factor, bf16x3};
use super::*;
use crate::rng::{Purpose, Stream};
use candle_core::{D, DType, Device, Result, Tensor, Var};

fn noise(id: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let values = Stream::new(11, Purpose::Parameters, [id, 0, 0, 0]).normals(shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

type Function = fn(&[Tensor]) -> Result<Tensor>;

/// Value and gradients of `sum(f(x) * g)` for a fixed random g.
fn value_and_gradients(f: Function, inputs: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
    let vars: Vec<Tensor> = inputs.iter().map(|t| Ok(Var::from_tensor(t)?.into_inner())).collect::<Result<_>>()?;
    let y = f(&vars)?;
    let g = noise(99, y.dims(), y.dtype())?;
    let grads = (&y * &g)?.sum_all()?.backward()?;
    let grads = vars.iter().map(|v| grads.get(v).expect("a gradient for every input").clone()).collect();
    Ok((y.detach(), grads))
}

fn max_error(a: &Tensor, b: &Tensor) -> Result<f64> {
    let a = a.to_dtype(DType::F64)?;
    let b = b.to_dtype(DType::F64)?;
    let scale = b.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?.max(1e-9);
    Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()? / scale)
}

/// Compares with the composed form in f32 and f64 and a few gradients with central differences.
fn check(f: Function, composed: Function, shapes: &[&[usize]]) -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 3e-6), (DType::F64, 1e-12)] {
        let inputs: Vec<Tensor> =
            shapes.iter().enumerate().map(|(i, s)| noise(i as u64, s, dtype)).collect::<Result<_>>()?;
        let (y, grads) = value_and_gradients(f, &inputs)?;
        let (y_composed, grads_composed) = value_and_gradients(composed, &inputs)?;
        assert!(max_error(&y, &y_composed)? < tolerance, "{dtype:?} value {}", max_error(&y, &y_composed)?);
        for (i, (a, b)) in grads.iter().zip(&grads_composed).enumerate() {
            assert_eq!(a.dims(), shapes[i]);
            assert!(max_error(a, b)? < tolerance, "{dtype:?} gradient {i}: {}", max_error(a, b)?);
        }
        // Without a graph the values are the same to the bit.
        assert_eq!(max_error(&f(&inputs)?, &y)?, 0.0);
        if dtype == DType::F64 {
            finite_differences(f, &inputs, &grads)?;
        }
    }
    Ok(())
}

fn finite_differences(f: Function, inputs: &[Tensor], grads: &[Tensor]) -> Result<()> {
    let step = 1e-5;
    for (i, input) in inputs.iter().enumerate() {
        let flat = input.flatten_all()?.to_vec1::<f64>()?;
        for at in [0, flat.len() / 2, flat.len() - 1] {
            let shifted = |by: f64| -> Result<f64> {
                let mut values = flat.clone();
                values[at] += by;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(values, input.dims(), &Device::Cpu)?;
                let y = f(&inputs)?;
                (&y * noise(99, y.dims(), DType::F64)?)?.sum_all()?.to_scalar::<f64>()
            };
            let numeric = (shifted(step)? - shifted(-step)?) / (2.0 * step);
            let exact = grads[i].flatten_all()?.to_vec1::<f64>()?[at];
            assert!((numeric - exact).abs() < 1e-7 * (1.0 + exact.abs()), "input {i} at {at}: {numeric} {exact}");
        }
    }
    Ok(())
}

#[test]
fn linear_matches_the_composed_form() -> Result<()> {
    check(
        |t| linear(&t[0], &t[1], Some(&t[2])),
        |t| t[0].reshape(((), 7))?.matmul(&t[1].t()?)?.reshape((3, 5, 9))?.broadcast_add(&t[2]),
        &[&[3, 5, 7], &[9, 7], &[9]],
    )?;
    check(|t| linear(&t[0], &t[1], None), |t| t[0].matmul(&t[1].t()?), &[&[17, 33], &[65, 33]])
}

#[test]
fn layer_norm_modulate_matches_the_composed_form() -> Result<()> {
    fn composed(t: &[Tensor]) -> Result<Tensor> {
        let n = t[0].dim(D::Minus1)? as f64;
        let x = t[0].broadcast_sub(&(t[0].sum_keepdim(D::Minus1)? / n)?)?;
        let x = x.broadcast_div(&((x.sqr()?.sum_keepdim(D::Minus1)? / n)? + 1e-6)?.sqrt()?)?;
        x.broadcast_mul(&(t[2].unsqueeze(1)? + 1.0)?)?.broadcast_add(&t[1].unsqueeze(1)?)
    }
    check(|t| layer_norm_modulate(&t[0], &t[1], &t[2], 1e-6), composed, &[&[3, 5, 40], &[3, 40], &[3, 40]])
}

#[test]
fn rms_norm_matches_the_composed_form() -> Result<()> {
    fn composed(t: &[Tensor]) -> Result<Tensor> {
        let n = t[0].dim(D::Minus1)? as f64;
        let x = t[0].broadcast_div(&((t[0].sqr()?.sum_keepdim(D::Minus1)? / n)? + 1e-6)?.sqrt()?)?;
        x.broadcast_mul(&t[1])
    }
    // 600 rows: more than two pieces, the last one short.
    check(|t| rms_norm(&t[0], &t[1], 1e-6), composed, &[&[2, 300, 24], &[24]])
}

#[test]
fn activations_match_the_composed_forms() -> Result<()> {
    // Not candle's own gelu: the constants of its derivative have six digits.
    fn tanh_gelu(t: &[Tensor]) -> Result<Tensor> {
        let x = &t[0];
        let u = ((x + ((x.sqr()? * x)? * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
        (x * (u.tanh()? + 1.0)?)?.affine(0.5, 0.0)
    }
    check(|t| gelu(&t[0]), tanh_gelu, &[&[3, 50]])?;
    check(|t| silu(&t[0]), |t| t[0].silu(), &[&[3, 50]])
}

#[test]
fn gated_residual_matches_the_composed_form() -> Result<()> {
    check(
        |t| gated_residual(&t[0], &t[1], &t[2]),
        |t| &t[0] + t[2].broadcast_mul(&t[1].unsqueeze(1)?)?,
        &[&[3, 5, 20], &[3, 20], &[3, 5, 20]],
    )
}

#[test]
fn attention_matches_the_composed_form() -> Result<()> {
    fn composed(t: &[Tensor]) -> Result<Tensor> {
        let head = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        let (q, k, v) = (head(&t[0])?, head(&t[1])?, head(&t[2])?);
        let logits = (q.matmul(&k.t()?)? * (q.dim(D::Minus1)? as f64).powf(-0.5))?;
        candle_nn::ops::softmax(&logits, D::Minus1)?.matmul(&v)?.transpose(1, 2)?.contiguous()
    }
    // 150 tokens: three slices, the last one short.
    let shape: &[usize] = &[2, 150, 3, 8];
    check(|t| attention(&t[0], &t[1], &t[2]), composed, &[shape, shape, shape])
}

/// Weight `[9, 7]`, bias `[9]`, and the scale of an adapter beside them, as constants: they are frozen.
fn frozen(dtype: DType) -> Result<(Tensor, Tensor, f64)> {
    Ok((noise(60, &[9, 7], dtype)?, noise(61, &[9], dtype)?, 1.5))
}

#[test]
fn lora_matches_the_composed_form() -> Result<()> {
    fn fused(t: &[Tensor]) -> Result<Tensor> {
        let (w, b, scale) = frozen(t[0].dtype())?;
        lora(&t[0], (&w, Some(&b)), (&t[1], &t[2], scale), Wanted::Value)
    }
    fn composed(t: &[Tensor]) -> Result<Tensor> {
        let (w, b, scale) = frozen(t[0].dtype())?;
        let x = t[0].reshape(((), 7))?;
        let beside = (x.matmul(&t[1].t()?)?.matmul(&t[2].t()?)? * scale)?;
        (x.matmul(&w.t()?)?.broadcast_add(&b)? + beside)?.reshape((3, 5, 9))
    }
    check(fused, composed, &[&[3, 5, 7], &[2, 7], &[9, 2]])?;
    let (w, _, scale) = frozen(DType::F32)?;
    let [x, a, b] = [(0, [4, 7]), (1, [2, 7]), (2, [9, 2])].map(|(id, shape)| noise(id, &shape, DType::F32));
    let (x, a, b, w) = (x?, a?, b?, Var::from_tensor(&w)?);
    let refused = lora(&x, (&w, None), (&a, &b, scale), Wanted::Value).expect_err("refused");
    assert!(refused.to_string().contains("has no derivative"), "{refused}");
    let refused = lora(&x, (&w.detach(), None), (&b, &a, scale), Wanted::Value).expect_err("refused");
    assert!(refused.to_string().contains("do not fit"), "{refused}");
    Ok(())
}

/// Split in halves an adapter in f32 is one of three times the rank in bf16, and off by 2^-17; rounded, it is off by 2^-9.
#[test]
fn halves_of_its_factors_make_an_adapter() -> Result<()> {
    fn whole(t: &[Tensor]) -> Result<Tensor> {
        let (w, b, scale) = frozen(t[0].dtype())?;
        lora(&t[0], (&w, Some(&b)), (&t[1], &t[2], scale), Wanted::Value)
    }
    fn halves(t: &[Tensor]) -> Result<Tensor> {
        let (w, b, scale) = frozen(t[0].dtype())?;
        let factors = (&bf16x3(&t[1], Factor::A)?, &bf16x3(&t[2], Factor::B)?, scale);
        assert_eq!((factors.0.dims(), factors.1.dims()), (&[6, 7][..], &[9, 6][..]));
        lora(&t[0], (&w, Some(&b)), factors, Wanted::Value)
    }
    let shapes: [&[usize]; 3] = [&[3, 5, 7], &[2, 7], &[9, 2]];
    let inputs: Vec<Tensor> = (0..3).map(|i| noise(i as u64, shapes[i], DType::F32)).collect::<Result<_>>()?;
    let in_bf16 = |t: &Tensor| t.to_dtype(DType::BF16)?.to_dtype(DType::F32);
    let rounded = [inputs[0].clone(), in_bf16(&inputs[1])?, in_bf16(&inputs[2])?];
    let (y, gradients) = value_and_gradients(whole, &inputs)?;
    let errors = |(value, of_inputs): (Tensor, Vec<Tensor>)| -> Result<Vec<f64>> {
        std::iter::once(&value)
            .chain(&of_inputs)
            .zip(std::iter::once(&y).chain(&gradients))
            .map(|(a, b)| max_error(a, b))
            .collect()
    };
    let (split, rounded) =
        (errors(value_and_gradients(halves, &inputs)?)?, errors(value_and_gradients(whole, &rounded)?)?);
    assert!(split.iter().all(|&e| e < 1e-5) && rounded.iter().all(|&e| e > 3e-4), "{split:?} {rounded:?}");
    for factor in [bf16x3(&inputs[1], Factor::A)?, bf16x3(&inputs[2], Factor::B)?] {
        assert_eq!(max_error(&in_bf16(&factor)?, &factor)?, 0.0, "numbers that bf16 has");
    }
    Ok(())
}

/// What is not wanted is not formed, and changes no bit of what is.
#[test]
fn gradients_alone_are_the_same_gradients() -> Result<()> {
    fn layer(wanted: Wanted, t: &[Tensor]) -> Result<Tensor> {
        linear_for(wanted, &t[0], &t[1], Some(&t[2]))
    }
    fn adapted(wanted: Wanted, t: &[Tensor]) -> Result<Tensor> {
        let (w, b, scale) = frozen(t[0].dtype())?;
        lora(&t[0], (&w, Some(&b)), (&t[1], &t[2], scale), wanted)
    }
    type Layer = fn(Wanted, &[Tensor]) -> Result<Tensor>;
    let layers: [(Layer, [&[usize]; 3]); 2] =
        [(layer, [&[3, 5, 7], &[9, 7], &[9]]), (adapted, [&[3, 5, 7], &[2, 7], &[9, 2]])];
    for (f, shapes) in layers {
        let leaf =
            |(i, shape): (usize, &&[usize])| Ok(Var::from_tensor(&noise(i as u64, shape, DType::F32)?)?.into_inner());
        let inputs: Vec<Tensor> = shapes.iter().enumerate().map(leaf).collect::<Result<_>>()?;
        let run = |wanted| -> Result<(f32, Vec<Vec<f32>>)> {
            let y = f(wanted, &inputs)?;
            let store = seed(&y, &noise(99, y.dims(), DType::F32)?)?.backward()?;
            let gradient = |t: &Tensor| store.get(t).expect("a gradient").flatten_all()?.to_vec1::<f32>();
            Ok((y.abs()?.sum_all()?.to_scalar()?, inputs.iter().map(gradient).collect::<Result<_>>()?))
        };
        let ((value, all), (none, alone)) = (run(Wanted::Value)?, run(Wanted::Gradient)?);
        assert!(value > 0.0 && none == 0.0 && all == alone);
    }
    Ok(())
}

#[test]
fn frozen_modulations_change_no_bit_of_the_gradients() -> Result<()> {
    type Case = (Function, [&'static [usize]; 3], &'static [usize]); // function, inputs, which of them may be frozen
    let cases: [Case; 3] = [
        (|t| gated_residual(&t[0], &t[1], &t[2]), [&[3, 5, 20], &[3, 20], &[3, 5, 20]], &[1]),
        (|t| layer_norm_modulate(&t[0], &t[1], &t[2], 1e-6), [&[3, 5, 40], &[3, 40], &[3, 40]], &[1, 2]),
        // 600 rows: more than two pieces, the last one short.
        (|t| rms_norm(&t[0], &t[1], 1e-6), [&[2, 300, 24], &[24], &[0]], &[1]),
    ];
    for (f, shapes, frozen) in cases {
        let inputs: Vec<Tensor> =
            shapes.iter().enumerate().map(|(i, s)| noise(i as u64, s, DType::F32)).collect::<Result<_>>()?;
        let run = |freeze: &[usize]| -> Result<Vec<Option<Vec<f32>>>> {
            let leaf = |(i, t): (usize, &Tensor)| match freeze.contains(&i) {
                true => Ok(t.clone()),
                false => Ok(Var::from_tensor(t)?.into_inner()),
            };
            let inputs: Vec<Tensor> = inputs.iter().enumerate().map(leaf).collect::<Result<_>>()?;
            let y = f(&inputs)?;
            let store = seed(&y, &noise(99, y.dims(), DType::F32)?)?.backward()?;
            inputs.iter().map(|t| store.get(t).map(|g| g.flatten_all()?.to_vec1()).transpose()).collect()
        };
        let (all, some) = (run(&[])?, run(frozen)?);
        for (i, (all, some)) in all.iter().zip(&some).enumerate() {
            match frozen.contains(&i) {
                true => assert!(all.is_some() && some.is_none(), "input {i}"),
                false => assert_eq!(all, some, "input {i}"),
            }
        }
    }
    Ok(())
}

#[test]
fn bf16_is_computed_in_f32() -> Result<()> {
    let x = Tensor::ones((1, 4096), DType::BF16, &Device::Cpu)?;
    let y = linear(&x, &x, None)?;
    assert_eq!((y.dtype(), y.to_dtype(DType::F32)?.to_vec2::<f32>()?), (DType::BF16, vec![vec![4096.0]]));
    Ok(())
}

/// An adapter in f32 beside a layer in bf16: the sum of both is rounded, and nothing before it; its gradients are in f32.
#[test]
fn adapters_beside_bf16_are_not_rounded() -> Result<()> {
    let (w, bias, scale) = frozen(DType::BF16)?;
    let leaf = |id, shape: &[usize]| Var::from_tensor(&noise(id, shape, DType::F32)?);
    let (x, a, b) = (noise(0, &[4, 7], DType::BF16)?, leaf(1, &[2, 7])?, leaf(2, &[9, 2])?);
    let wide = |t: &Tensor| t.to_dtype(DType::F32);
    let y = lora(&x, (&w, Some(&bias)), (&a, &b, scale), Wanted::Value)?;
    let expected = lora(&wide(&x)?, (&wide(&w)?, Some(&wide(&bias)?)), (&a, &b, scale), Wanted::Value)?;
    let (g, bits) = (noise(99, y.dims(), DType::BF16)?, |t: &Tensor| wide(t)?.to_vec2::<f32>());
    assert_eq!((y.dtype(), bits(&y)?), (DType::BF16, bits(&expected.to_dtype(DType::BF16)?)?));
    let gradients = [seed(&y, &g)?.backward()?, seed(&expected, &wide(&g)?)?.backward()?];
    for factor in [&a, &b] {
        let [found, expected] = gradients.each_ref().map(|store| store.get(factor).expect("a gradient"));
        assert_eq!((found.dtype(), bits(found)?), (DType::F32, bits(expected)?));
    }
    Ok(())
}

#[test]
fn frozen_operands_get_no_gradient() -> Result<()> {
    let x = Var::from_tensor(&noise(0, &[4, 6], DType::F32)?)?;
    let (w, b) = (noise(1, &[5, 6], DType::F32)?, noise(2, &[5], DType::F32)?);
    let grads = linear(&x, &w, Some(&b))?.sum_all()?.backward()?;
    assert!(grads.get(&x).is_some() && grads.get(&w).is_none() && grads.get(&b).is_none());
    Ok(())
}

/// The others and the factors as constants: they have no derivative.
#[test]
fn deviations_match_the_composed_form() -> Result<()> {
    const SHAPE: [usize; 3] = [3, 11, 30];
    fn constants(dtype: DType) -> Result<(Tensor, Tensor)> {
        Ok((noise(50, &[3, 2, 11, 30], dtype)?, noise(51, &[3, 4, 2], dtype)?))
    }
    fn fused(t: &[Tensor]) -> Result<Tensor> {
        let (others, factors) = constants(t[0].dtype())?;
        deviations(&t[0], &others, &factors)
    }
    fn composed(t: &[Tensor]) -> Result<Tensor> {
        let (others, factors) = constants(t[0].dtype())?;
        let all = Tensor::cat(&[t[0].unsqueeze(1)?, others], 1)?.flatten_from(2)?; // [B, links + 1, n]
        let r = factors.matmul(&(all.narrow(1, 0, 2)? - all.narrow(1, 1, 2)?)?)?; // [B, count, n]
        Tensor::stack(&[r.sqr()?.sum(D::Minus1)?, r.abs()?.sum(D::Minus1)?], 2)
    }
    check(fused, composed, &[&SHAPE])?;
    let (v, (others, factors)) = (noise(1, &SHAPE, DType::F32)?, constants(DType::F32)?);
    let refused = |others: &Tensor, factors: &Tensor| deviations(&v, others, factors).expect_err("refused").to_string();
    assert!(refused(Var::from_tensor(&others)?.as_tensor(), &factors).contains("has no derivative"));
    assert!(refused(&others.narrow(1, 0, 1)?, &factors).contains("do not fit"));
    Ok(())
}

#[test]
fn linear_gelu_matches_the_composed_form() -> Result<()> {
    check(
        |t| linear_gelu(&t[0], &t[1], Some(&t[2])),
        |t| gelu(&t[0].reshape(((), 7))?.matmul(&t[1].t()?)?.reshape((3, 5, 9))?.broadcast_add(&t[2])?),
        &[&[3, 5, 7], &[9, 7], &[9]],
    )
}

/// Something of everything that a tape has to follow: results that are used twice, parts that nobody looks at, candle's own
/// operations before, between and after ours.
fn winding(t: &[Tensor]) -> Result<Tensor> {
    let x = (&t[0] * 0.5)?; // candle's, of a leaf
    let h = linear(&x, &t[1], Some(&t[2]))?; // [3, 5, 8]
    let (first, second) = split(&reshape(&h, (3, 5, 2, 4))?, 2)?;
    let again = join(&second, &rms_norm(&second.sqr()?, &t[3], 1e-6)?)?; // [3, 6, 2, 4]
    let (left, _) = split(&again, 4)?;
    let own = attention(&left, &left, &left)?; // [3, 4, 2, 4]
    let all = join(&own, &first)?.transpose(1, 2)?.contiguous()?; // candle's, between ours
    let sum = (silu(&reshape(&all, (3, 2, 24))?)? + gelu(&all.reshape((3, 2, 24))?)?)?;
    let pieces = chunk(&reshape(&sum, (3, 48))?, 4)?; // [3, 12], of which one is not used and one twice
    ((&pieces[0] + (silu(&pieces[2])? * &pieces[3])?)? * &pieces[2])?.tanh()
}

#[test]
fn a_tape_gives_the_gradients_of_candles_graph() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let shapes: [&[usize]; 4] = [&[3, 5, 7], &[8, 7], &[8], &[4]];
        let leaf = |i: usize| Ok(Var::from_tensor(&noise(i as u64, shapes[i], dtype)?)?.into_inner());
        let leaves = (0..4).map(leaf).collect::<Result<Vec<Tensor>>>()?;
        let by_candle = winding(&leaves)?;
        let gradient = noise(99, by_candle.dims(), dtype)?;
        let expected = (&by_candle * &gradient)?.sum_all()?.backward()?;
        let (value, tape) = recorded(|| winding(&leaves))?;
        assert_eq!(max_error(&value, &by_candle)?, 0.0);
        let mut found = tape.backward([(&value, gradient)])?;
        for leaf in &leaves {
            let (found, expected) = (found.remove(leaf).expect("a gradient"), expected.get(leaf).expect("a gradient"));
            let error = max_error(&found, expected)?;
            assert!(error < if dtype == DType::F32 { 1e-6 } else { 1e-14 }, "{dtype:?}: {error}");
        }
    }
    Ok(())
}

#[test]
fn an_error_or_a_panic_ends_a_tape() -> Result<()> {
    let failed = recorded(|| linear(&noise(0, &[2, 3], DType::F32)?, &noise(1, &[2, 4], DType::F32)?, None));
    assert!(failed.is_err() && !tape::is_running());
    assert!(std::panic::catch_unwind(|| recorded(|| -> Result<()> { panic!("on purpose") })).is_err());
    assert!(!tape::is_running());
    Ok(())
}
