//! The two floating-point types of the CPU kernels, and the loops' vector instructions.

use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// f32 for work, f64 for the finite differences of the tests.
pub(super) trait Float:
    candle_core::WithDType
    + Copy
    + Send
    + Sync
    + 'static
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    const ZERO: Self;
    const ONE: Self;
    fn of(x: f64) -> Self;
    fn exp(self) -> Self;
    fn sqrt(self) -> Self;
    fn larger(self, other: Self) -> Self;
}

impl Float for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn of(x: f64) -> Self {
        x
    }
    fn exp(self) -> Self {
        libm::exp(self)
    }
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    fn larger(self, other: Self) -> Self {
        self.max(other)
    }
}

impl Float for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    /// 2^n e^r with r in +-ln(2)/2 by the degree-6 polynomial of Cephes' expf; within 2 ulp, and the compiler can
    /// run it on whole vectors, which the C library's function prevents.
    #[inline(always)]
    fn exp(self) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding and subtracting it rounds to an integer
        let x = self.clamp(-87.3, 88.3);
        let rounded = x * std::f32::consts::LOG2_E + ROUND; // its last bits are n
        let n = rounded - ROUND;
        let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
        let mut p = 1.987_569_1e-4f32;
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
            p = p * r + c;
        }
        let y = (p * r * r + r) + 1.0;
        y * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

/// Independent partial sums: a plain running sum is one serial chain that no vector instruction can take.
const LANES: usize = 16;

/// Sum of `f(a, b)` over the pairs, in a fixed order that does not depend on the instructions used.
#[inline(always)]
pub(super) fn sum_pairs<F: Float>(a: &[F], b: &[F], f: impl Fn(F, F) -> F) -> F {
    let mut lanes = [F::ZERO; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let mut total = F::ZERO;
    for (&x, &y) in a_chunks.remainder().iter().zip(b_chunks.remainder()) {
        total += f(x, y);
    }
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += f(a[lane], b[lane]);
        }
    }
    for lane in lanes {
        total += lane;
    }
    total
}

/// Sum of products.
#[inline(always)]
pub(super) fn dot<F: Float>(a: &[F], b: &[F]) -> F {
    sum_pairs(a, b, |x, y| x * y)
}

/// Sum.
#[inline(always)]
pub(super) fn sum<F: Float>(a: &[F]) -> F {
    sum_pairs(a, a, |x, _| x)
}

/// The largest element; the smallest number there is of none.
#[inline(always)]
pub(super) fn largest<F: Float>(a: &[F]) -> F {
    let mut lanes = [F::of(f64::NEG_INFINITY); LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder().iter().fold(F::of(f64::NEG_INFINITY), |most, &x| Float::larger(most, x));
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = Float::larger(lanes[lane], chunk[lane]);
        }
    }
    lanes.into_iter().fold(rest, Float::larger)
}

/// Runs `f`, compiled for the vector instructions that this processor has.
#[inline(always)]
pub(super) fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Product of matrices into `out` `[m, n]` (row-major), `a` `[m, k]` and `b` `[k, n]` by (row, column) strides;
/// added to what is there if `accumulate`.
#[allow(clippy::too_many_arguments, reason = "a matrix product has these many numbers")]
pub(super) fn matmul<F: Float>(
    (m, k, n): (usize, usize, usize),
    a: (&[F], usize, usize),
    b: (&[F], usize, usize),
    out: &mut [F],
    out_row: usize,
    alpha: F,
    accumulate: bool,
    threads: usize,
) {
    if m == 0 || n == 0 {
        return;
    }
    let last = |rows: usize, columns: usize, rs: usize, cs: usize| (rows.max(1) - 1) * rs + (columns.max(1) - 1) * cs;
    assert!(k > 0 && last(m, k, a.1, a.2) < a.0.len() && last(k, n, b.1, b.2) < b.0.len());
    assert!(last(m, n, out_row, 1) < out.len());
    let parallelism = if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
    // SAFETY: the asserts above hold the farthest element of each operand inside its slice; `out` is borrowed alone.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_row as isize,
            accumulate,
            a.0.as_ptr(),
            a.2 as isize,
            a.1 as isize,
            b.0.as_ptr(),
            b.2 as isize,
            b.1 as isize,
            F::ONE,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_of_the_f64_value() {
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            assert!((f64::from(Float::exp(x)) - exact).abs() <= 2.4e-7 * exact, "{x}");
        }
        assert_eq!(Float::exp(0f32), 1.0);
        assert!(Float::exp(-1000f32) < 2e-38);
        assert!(Float::exp(f32::NAN).is_nan());
    }
}
