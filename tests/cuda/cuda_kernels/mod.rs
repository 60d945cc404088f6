//! The GPU's kernels, and their launches, on the CPU, against the operations of the CPU: no GPU is needed. What this cannot
//! show (races, what the compiler for the GPU makes of them, speed), tests/cuda_ops/main.rs shows on a GPU.

mod host;

use candle_core::{DType, Device, Tensor, Var};
use flowrl_dist::cuda::elementwise::{Span, copy_parts};
use flowrl_dist::cuda::picture::{self, Neighbours};
use flowrl_dist::cuda::reduce::{Summand, square_sums, sum_rows};
use flowrl_dist::cuda::{Array, Gpu, attention, deviation, elementwise, norm};
use flowrl_dist::ops;
use flowrl_dist::rng::{Purpose, Stream};
use host::{Host, Memory};

const EPS: f64 = 1e-6;

/// Relative to the largest number: of f32 sums in another order, and of results that are rounded to bf16.
fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 6e-3 } else { 3e-6 }
}

/// Normal numbers, those of bf16 already rounded.
fn noise(id: u64, shape: &[usize], dtype: DType) -> Tensor {
    let values = Stream::new(5, Purpose::Parameters, [id, 0, 0, 0]).normals(shape.iter().product());
    let noise = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    noise.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()
}

fn close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (found, expected) = (flat(found), flat(expected));
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-9f32, |a, b| a.max(b.abs()));
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        let error = f64::from((a - b).abs() / largest);
        assert!(error <= tolerance, "{what}: number {i} is {a}, not {b} (error {error:.1e} of {largest})"); // NaN fails too
    }
}

/// The operation of the CPU on inputs `shapes`: inputs, result, its gradient and those of the inputs.
struct Case {
    inputs: Vec<Tensor>,
    y: Tensor,
    dy: Tensor,
    gradients: Vec<Tensor>,
}

fn case(f: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>, shapes: &[&[usize]], dtype: DType) -> Case {
    let inputs: Vec<_> = shapes.iter().enumerate().map(|(i, shape)| noise(i as u64, shape, dtype)).collect();
    let vars: Vec<_> = inputs.iter().map(|t| Var::from_tensor(t).unwrap().into_inner()).collect();
    let y = f(&vars).unwrap();
    let dy = noise(99, y.dims(), dtype);
    let store = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
    let gradients = vars.iter().map(|v| store.get(v).unwrap().clone()).collect();
    Case { inputs, y: y.detach(), dy, gradients }
}

impl Case {
    fn arrays(&self, host: &Host, dtype: DType) -> Vec<Array> {
        self.inputs.iter().chain([&self.dy]).map(|t| host.put(t, dtype)).collect()
    }

    /// The result, and the gradients of the inputs by number.
    fn check(&self, what: &str, dtype: DType, y: &Memory, gradients: &[(usize, &Memory)]) {
        close(&format!("{what} of {dtype:?}"), &y.read(dtype, self.y.dims()), &self.y, tolerance(dtype));
        for &(i, gradient) in gradients {
            let what = format!("{what} of {dtype:?}, gradient {i}");
            close(&what, &gradient.read(dtype, self.inputs[i].dims()), &self.gradients[i], 2.0 * tolerance(dtype));
        }
    }
}

const TYPES: [DType; 2] = [DType::F32, DType::BF16];

#[test]
fn activations() {
    for dtype in TYPES {
        for (name, f) in [("gelu", ops::gelu as fn(&Tensor) -> _), ("silu", ops::silu)] {
            let (host, case) = (Host::default(), case(|t| f(&t[0]), &[&[7, 143]], dtype));
            let arrays = case.arrays(&host, dtype);
            let y = elementwise::activation(&host, name, &arrays[0]).unwrap();
            let dx = elementwise::activation_backward(&host, name, &arrays[0], &arrays[1]).unwrap();
            case.check(name, dtype, &y, &[(0, &dx)]);
        }
    }
}

#[test]
fn biases() {
    for dtype in TYPES {
        let (host, y, bias) = (Host::default(), noise(0, &[9, 300], dtype), noise(1, &[300], dtype));
        let array = host.put(&y, dtype);
        elementwise::add_bias(&host, &array, &host.put(&bias, dtype)).unwrap();
        close("bias", &host.get(&array), &y.broadcast_add(&bias).unwrap(), tolerance(dtype));
        // The gradient of a bias: rows in three pieces, the last one short; columns one by one, in packs, in packs of two
        // blocks; of two factors the second of which is aligned, or not.
        for width in [45, 64, 264] {
            let (dy, other) = (noise(2, &[300, width], dtype), noise(3, &[301, width], dtype));
            let (array, others) = (host.put(&dy, dtype), host.put(&other, dtype));
            let sum = sum_rows(&host, Summand::Plain(&array), 1).unwrap();
            close("sum of rows", &sum.read(dtype, &[width]), &dy.sum(0).unwrap(), tolerance(dtype));
            let product = |from: usize| {
                let pointer = others.pointer + (from * dtype.size_in_bytes()) as u64;
                let part = Array { pointer, shape: vec![300, width], ..others.clone() };
                let sum = sum_rows(&host, Summand::Product(&array, &part), 1).unwrap().read(dtype, &[width]);
                let part = other.flatten_all().unwrap().narrow(0, from, 300 * width).unwrap();
                let expected = (&dy * part.reshape((300, width)).unwrap()).unwrap().sum(0).unwrap();
                close("sum of products", &sum, &expected, tolerance(dtype));
            };
            product(0);
            product(1);
        }
    }
}

#[test]
fn gated_residuals() {
    for dtype in TYPES {
        let shapes: &[&[usize]] = &[&[3, 11, 70], &[3, 70], &[3, 11, 70]];
        let (host, case) = (Host::default(), case(|t| ops::gated_residual(&t[0], &t[1], &t[2]), shapes, dtype));
        let [x, gate, y, d] = &case.arrays(&host, dtype)[..] else { unreachable!() };
        let out = elementwise::gated_residual(&host, x, gate, y).unwrap();
        let (dgate, dy) = elementwise::gated_residual_backward(&host, gate, y, d, true).unwrap();
        case.check("gated_residual", dtype, &out, &[(1, &dgate.unwrap()), (2, &dy)]);
        let (dgate, dy) = elementwise::gated_residual_backward(&host, gate, y, d, false).unwrap();
        assert!(dgate.is_none());
        case.check("gated_residual", dtype, &out, &[(2, &dy)]);
    }
}

#[test]
fn layer_norms() {
    for (dtype, shape) in [(DType::F32, [3, 5, 40]), (DType::BF16, [3, 5, 40]), (DType::F32, [2, 131, 65])] {
        let [batch, _, width] = shape;
        let shapes: &[&[usize]] = &[&shape, &[batch, width], &[batch, width]];
        let f = |t: &[Tensor]| ops::layer_norm_modulate(&t[0], &t[1], &t[2], EPS);
        let (host, case) = (Host::default(), case(f, shapes, dtype));
        let [x, shift, scale, dy] = &case.arrays(&host, dtype)[..] else { unreachable!() };
        let out = norm::layer_norm_modulate(&host, x, shift, scale, EPS as f32).unwrap();
        let backward = |modulation| norm::layer_norm_modulate_backward(&host, x, scale, dy, EPS as f32, modulation);
        let [Some(dx), None, None] = backward(false).unwrap() else { panic!("only the gradient of x") };
        case.check("layer_norm_modulate", dtype, &out, &[(0, &dx)]);
        let [dx, dshift, dscale] = backward(true).unwrap().map(Option::unwrap);
        case.check("layer_norm_modulate", dtype, &out, &[(0, &dx), (1, &dshift), (2, &dscale)]);
    }
}

#[test]
fn rms_norms() {
    for dtype in TYPES {
        let (host, case) =
            (Host::default(), case(|t| ops::rms_norm(&t[0], &t[1], EPS), &[&[2, 75, 4, 64], &[64]], dtype));
        let [x, weight, dy] = &case.arrays(&host, dtype)[..] else { unreachable!() };
        let out = norm::rms_norm(&host, x, weight, EPS as f32).unwrap();
        let (dx, dweight) = norm::rms_norm_backward(&host, x, weight, dy, EPS as f32, true).unwrap();
        case.check("rms_norm", dtype, &out, &[(0, &dx), (1, &dweight.unwrap())]);
        let (dx, none) = norm::rms_norm_backward(&host, x, weight, dy, EPS as f32, false).unwrap();
        assert!(none.is_none());
        case.check("rms_norm", dtype, &out, &[(0, &dx)]);
    }
}

fn check_attention(host: &Host, dtype: DType, shapes: &[[usize; 4]]) {
    for shape in shapes {
        let shape: &[usize] = shape;
        let case = case(|t| ops::attention(&t[0], &t[1], &t[2]), &[shape; 3], dtype);
        let [q, k, v, d_out] = &case.arrays(host, dtype)[..] else { unreachable!() };
        let [y, lse] = attention::attention(host, q, k, v).unwrap();
        let out = host.array(&y, dtype, shape).unwrap();
        let lse = host.array(&lse, DType::F32, &[shape[0], shape[2], shape[1]]).unwrap();
        let backward = attention::Backward { q, k, v, out: &out, lse: &lse, d_out };
        let [dq, dk, dv] = backward.run(host).unwrap();
        case.check(&format!("attention {shape:?}"), dtype, &y, &[(0, &dq), (1, &dk), (2, &dv)]);
    }
}

/// Two streams' heads, normalised into one sequence and back out of it; rows that are no whole warp.
#[test]
fn heads_normalised_into_a_longer_sequence() {
    for dtype in TYPES {
        let shapes: &[&[usize]] = &[&[2, 7, 3, 64], &[64], &[2, 5, 3, 64], &[64]];
        let f = |t: &[Tensor]| Tensor::cat(&[ops::rms_norm(&t[0], &t[1], EPS)?, ops::rms_norm(&t[2], &t[3], EPS)?], 1);
        let (host, case) = (Host::default(), case(f, shapes, dtype));
        let [x, weight, other, other_weight, dy] = &case.arrays(&host, dtype)[..] else { unreachable!() };
        let memory = host.allocate(dtype, case.y.elem_count()).unwrap();
        let out = host.array(&memory, dtype, case.y.dims()).unwrap();
        norm::rms_norm_into(&host, x, weight, (&out, 0), EPS as f32).unwrap();
        norm::rms_norm_into(&host, other, other_weight, (&out, 7), EPS as f32).unwrap();
        let back = |x, weight, start, dweight| {
            norm::rms_norm_backward_from(&host, x, weight, (dy, start), EPS as f32, dweight).unwrap()
        };
        let ((dx, dweight), (dother, none)) = (back(x, weight, 0, true), back(other, other_weight, 7, false));
        assert!(none.is_none());
        let dother_weight = back(other, other_weight, 7, true).1.unwrap();
        let gradients = [(0, &dx), (1, &dweight.unwrap()), (2, &dother), (3, &dother_weight)];
        case.check("rms_norm_joined", dtype, &memory, &gradients);
    }
}

#[test]
fn parts_are_copied_and_sums_formed() {
    for dtype in TYPES {
        let host = Host::default();
        let (source, destination) = (noise(0, &[3, 6, 8], dtype), noise(1, &[3, 9, 8], dtype));
        let (from, to) = (host.put(&source, dtype), host.put(&destination, dtype));
        let token = 8 * dtype.size_in_bytes();
        let span = |start, all| Span { start: start * token, length: 4 * token, all: all * token };
        copy_parts(&host, 3, (&from, span(2, 6)), (&to, span(3, 9))).unwrap();
        let part = |t: &Tensor, start, len| t.narrow(1, start, len).unwrap();
        let expected = [part(&destination, 0, 3), part(&source, 2, 4), part(&destination, 7, 2)];
        close("copy_parts", &host.get(&to), &Tensor::cat(&expected, 1).unwrap(), 0.0);
        assert!(copy_parts(&host, 3, (&from, Span { start: 2, ..span(2, 6) }), (&to, span(3, 9))).is_err());

        let other = noise(2, &[3, 6, 8], dtype);
        let sum = elementwise::add(&host, &from, &host.put(&other, dtype)).unwrap();
        close("add", &sum.read(dtype, &[3, 6, 8]), &(&source + &other).unwrap(), tolerance(dtype));
    }
}

/// Tiles of 64 and 32 rows, the last ones short; and a sequence shorter than any tile.
#[test]
fn attention_of_any_head_and_on_the_matrix_units() {
    let any = [[2, 21, 2, 24], [1, 9, 1, 128], [1, 7, 2, 300], [1, 5, 3, 64]];
    check_attention(&Host::default(), DType::F32, &any);
    let units = [[2, 150, 2, 64], [1, 5, 3, 64], [1, 129, 1, 64], [1, 21, 2, 24]];
    check_attention(&Host::default(), DType::BF16, &units);
}

/// Blocks of 128 rows and tiles of 64: one tile, a whole one, places of the ring that are used again.
#[test]
fn attention_with_the_products_of_a_warpgroup() {
    let shapes = [[1, 5, 3, 64], [2, 64, 2, 64], [1, 129, 3, 64], [2, 150, 2, 64], [1, 400, 1, 64]];
    check_attention(&Host::hopper(), DType::BF16, &shapes);
}

/// Pictures whose pixels are no whole number of pieces, and far from zero.
#[test]
fn group_norms() {
    for dtype in TYPES {
        for (height, width, silu) in [(5, 7, false), (19, 14, true)] {
            let host = Host::default();
            let x = noise(0, &[2, height, width, 24], dtype).affine(0.5, 8.0).unwrap().to_dtype(dtype).unwrap();
            let (x, weight, bias) = (x.to_dtype(DType::F32).unwrap(), noise(1, &[24], dtype), noise(2, &[24], dtype));
            let expected = ops::group_norm(&x, &weight, &bias, 4, EPS, silu).unwrap();
            let affine = (&host.put(&weight, dtype), &host.put(&bias, dtype));
            let y = picture::group_norm(&host, &host.put(&x, dtype), affine, 4, EPS as f32, silu).unwrap();
            let tolerance = if dtype == DType::BF16 { 6e-3 } else { 1e-5 };
            close("group_norm", &y.read(dtype, x.dims()), &expected, tolerance);
        }
    }
}

/// On every walk, from any pixel on: a convolution whose weights pick one neighbour and one channel.
#[test]
fn neighbours_of_pixels() {
    let dtype = DType::F32;
    let (host, x) = (Host::default(), noise(0, &[2, 6, 5, 8], dtype));
    let array = host.put(&x, dtype);
    for (walk, kind, size) in [(0, ops::Walk::Same, 3), (1, ops::Walk::Half, 3), (2, ops::Walk::Double, 3)] {
        // All neighbours as channels of their own.
        let pick = Tensor::eye(size * size * 8, dtype, &Device::Cpu).unwrap().reshape((size, size, 8, ())).unwrap();
        let bias = Tensor::zeros(size * size * 8, dtype, &Device::Cpu).unwrap();
        let expected = ops::convolution(&x, &pick, &bias, kind, None).unwrap();
        let (_, rows, columns, width) = expected.dims4().unwrap();
        let (first, count) = (3, rows * columns - 3);
        let memory = host.allocate(dtype, count * width).unwrap();
        let out = host.array(&memory, dtype, &[count, width]).unwrap();
        let of = Neighbours { sample: 1, size, walk, out_width: columns, first, count };
        picture::gather(&host, &array, &out, of).unwrap();
        let expected = expected.get(1).unwrap().reshape(((), width)).unwrap().narrow(0, first, count).unwrap();
        close(&format!("gather {kind:?}"), &memory.read(dtype, &[count, width]), &expected, 0.0);
    }
}

/// Of one deviation and of four, with pieces and without; one of them is zero everywhere.
#[test]
fn deviations() {
    let dtype = DType::F32;
    for (sample, count, links) in [([2, 50, 130], 3, 3), ([1, 7, 9], 1, 1), ([3, 1, 4096], 4, 4)] {
        let [batch, rows, columns] = sample;
        let shapes: [&[usize]; 2] = [&sample, &[batch, links, rows, columns]];
        let (host, factors) = (Host::default(), noise(7, &[batch, count, links], dtype));
        let last = factors.narrow(1, 0, count - 1).unwrap();
        let factors = Tensor::cat(&[last, Tensor::zeros((batch, 1, links), dtype, &Device::Cpu).unwrap()], 1).unwrap();
        let others = noise(8, shapes[1], dtype);
        let case = case(|t| ops::deviations(&t[0], &others, &factors), &shapes[..1], dtype);
        let [v, d] = &case.arrays(&host, dtype)[..] else { unreachable!() };
        let (others, factors) = (host.put(&others, dtype), host.put(&factors, dtype));
        let sums = deviation::sums(&host, v, &others, &factors).unwrap();
        let dv = deviation::backward(&host, v, &others, &factors, d).unwrap();
        case.check(&format!("deviations {sample:?}"), dtype, &sums, &[(0, &dv)]);
    }
    // Of equal tensors exactly nothing, whatever stands beside them.
    let host = Host::default();
    let [v, other] = [1, 2].map(|id| noise(id, &[2, 2, 300], dtype));
    let others = host.put(&Tensor::stack(&[&v, &other], 1).unwrap(), dtype);
    let factors = host.put(&Tensor::new(&[[[0.3f32, 0.0]], [[-0.7, 0.0]]], &Device::Cpu).unwrap(), dtype);
    let (v, d) = (host.put(&v, dtype), host.put(&noise(3, &[2, 1, 2], dtype), dtype));
    let zero = |what: &str, memory: &host::Memory, shape: &[usize]| {
        close(what, &memory.read(dtype, shape), &Tensor::zeros(shape, dtype, &Device::Cpu).unwrap(), 0.0);
    };
    zero("no deviation", &deviation::sums(&host, &v, &others, &factors).unwrap(), &[2, 1, 2]);
    zero("no gradient", &deviation::backward(&host, &v, &others, &factors, &d).unwrap(), &[2, 2, 300]);
}

#[test]
fn sums_of_squares() {
    let (host, x) = (Host::default(), noise(0, &[150_001], DType::F32));
    let (sums, pieces) = square_sums(&host, &host.put(&x, DType::F32)).unwrap();
    assert_eq!(pieces, 3);
    let sum = sums.read(DType::F64, &[pieces]).sum_all().unwrap();
    close("square_sums", &sum, &x.sqr().unwrap().sum_all().unwrap(), 1e-5);
}

/// An adapter's factors of f32 as high and low halves in bf16: A's by rows, B's by columns.
#[test]
fn factors_in_halves() {
    let host = Host::default();
    let x = noise(0, &[5, 37], DType::F32);
    let high = x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    let low = (&x - &high).unwrap().to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    for (dim, low_at, width, all) in [(0, 1, 5 * 37, [&high, &low, &high]), (1, 2, 37, [&high, &high, &low])] {
        let expected = Tensor::cat(&all, dim).unwrap();
        let y = elementwise::bf16x3(&host, &host.put(&x, DType::F32), width, low_at).unwrap();
        close("bf16x3", &y.read(DType::BF16, expected.dims()), &expected, 0.0);
        let dy = noise(1, expected.dims(), DType::BF16);
        let dx = elementwise::bf16x3_backward(&host, &host.put(&dy, DType::BF16), width, low_at).unwrap();
        let place = |i: usize| dy.narrow(dim, i * x.dims()[dim], x.dims()[dim]).unwrap();
        close("bf16x3_backward", &dx.read(DType::F32, x.dims()), &(place(0) + place(3 - low_at)).unwrap(), 0.0);
    }
}

#[test]
fn gradients_are_added_in_place() {
    for dtype in TYPES {
        // Where packs begin, and where they do not.
        for start in [7, 8] {
            let (host, sum, gradient) = (Host::default(), noise(0, &[50], DType::F32), noise(1, &[21], dtype));
            let array = host.put(&sum, DType::F32);
            let place = Array { pointer: array.pointer + 4 * start as u64, shape: vec![50 - start], ..array.clone() };
            elementwise::add_to(&host, &place, &host.put(&gradient, dtype)).unwrap();
            let zeros = |n| Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap();
            let added = (sum + Tensor::cat(&[zeros(start), gradient, zeros(29 - start)], 0).unwrap()).unwrap();
            close("add_to", &host.get(&array), &added, 1e-7);
        }
    }
}

#[test]
fn adamw_steps_and_slow_copies() {
    let host = Host::default();
    let (n, state) = (333, noise(0, &[999], DType::F32).abs().unwrap());
    let gradient = noise(1, &[n], DType::F32);
    let array = host.put(&state, DType::F32);
    let (scale, betas, decay, rate, root, eps) = (0.3, (0.9, 0.999), 0.99, 0.02, 0.1, 1e-8);
    let numbers = elementwise::AdamwNumbers { scale, betas, decay, rate, root, eps };
    elementwise::adamw(&host, &array, &host.put(&gradient, DType::F32), numbers).unwrap();
    let part = |i: usize| state.narrow(0, i * n, n).unwrap().to_vec1::<f32>().unwrap();
    let (mut master, mut first, mut second) = (part(0), part(1), part(2));
    for (i, g) in gradient.to_vec1::<f32>().unwrap().into_iter().enumerate() {
        let g = g * scale;
        first[i] = betas.0 * first[i] + (1.0 - betas.0) * g;
        second[i] = betas.1 * second[i] + (1.0 - betas.1) * g * g;
        master[i] = master[i] * decay - rate * first[i] / (second[i].sqrt() / root + eps);
    }
    let expected = Tensor::from_vec([master, first, second].concat(), 3 * n, &Device::Cpu).unwrap();
    close("adamw", &host.get(&array), &expected, 3e-7);

    let (slow, source) = (noise(2, &[n], DType::F32), noise(3, &[n], DType::F32));
    let array = host.put(&slow, DType::F32);
    let copy = host.put(&source, DType::F32);
    elementwise::lerp(&host, &array, &copy, 0.7).unwrap();
    close("lerp", &host.get(&array), &((slow * 0.7).unwrap() + (&source * 0.3).unwrap()).unwrap(), 3e-7);
    elementwise::lerp(&host, &copy, &host.put(&source, DType::F32), 0.7).unwrap();
    close("lerp of equal vectors", &host.get(&copy), &source, 0.0);
}

#[test]
fn time_features() {
    let (host, t) = (Host::default(), Tensor::new(&[0f32, 0.001, 0.37, 1.0], &Device::Cpu).unwrap());
    let features = elementwise::time_features(&host, &host.put(&t, DType::F32), 128).unwrap();
    close("time_features", &features.read(DType::F32, &[4, 256]), &ops::time_features(&t, 128).unwrap(), 1e-7);
}
