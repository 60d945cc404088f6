//! What the objectives measure: how far weighted sums of differences of velocities lie from zero.

use super::float::{Float, dot, sum_pairs};
use super::kernel::{Kernel, View, fill, refuse_tracked, run};
use super::op::{Differentiable, apply3};
use candle_core::{Result, Tensor, bail};

/// Elements that are combined at once.
const BLOCK: usize = 256;

/// Deviations at once, and differences in each, at most: the GPU's kernel keeps them in registers.
const MOST: usize = 4;

/// `[B, n]`, others `[B, links, n]` and factors `[B, count, links]` of a batch.
struct Sizes {
    n: usize,
    links: usize,
    count: usize,
}

impl Sizes {
    fn of(v: &[usize], others: &[usize], factors: &[usize]) -> Result<Self> {
        let (&[batch, count, links], Some((&first, sample))) = (factors, v.split_first()) else {
            bail!("deviations: {v:?} and factors {factors:?} are no batch");
        };
        let fits = first == batch && others.len() == v.len() + 1 && others[..2] == [batch, links];
        if !fits || others[2..] != *sample || !(1..=MOST).contains(&links) || !(1..=MOST).contains(&count) {
            bail!("deviations: {v:?}, {others:?} and factors {factors:?} do not fit");
        }
        Ok(Self { n: sample.iter().product(), links, count })
    }
}

/// One sample.
struct Sample<'a, F> {
    sizes: &'a Sizes,
    v: &'a [F],
    others: &'a [F],
    factors: &'a [F],
}

impl<'a, F: Float> Sample<'a, F> {
    fn new(b: usize, sizes: &'a Sizes, [v, others, factors]: [View<'a, F>; 3]) -> Self {
        let &Sizes { n, links, count } = sizes;
        let part = |view: View<'a, F>, len: usize| &view.data[b * len..][..len];
        Self { sizes, v: part(v, n), others: part(others, links * n), factors: part(factors, count * links) }
    }

    /// The factor of v in deviation m.
    fn own(&self, m: usize) -> F {
        self.factors[m * self.sizes.links]
    }

    /// Deviation m from element `start` on.
    #[inline(always)]
    fn deviation(&self, m: usize, start: usize, out: &mut [F]) {
        let factors = &self.factors[m * self.sizes.links..][..self.sizes.links];
        let mut before = &self.v[start..];
        out.fill(F::ZERO);
        for (&factor, other) in factors.iter().zip(self.others.chunks_exact(self.sizes.n)) {
            let other = &other[start..];
            for ((out, &x), &y) in out.iter_mut().zip(before).zip(other) {
                *out += factor * (x - y);
            }
            before = other;
        }
    }
}

/// v `[B, ..]`, others `[B, links, ..]`, factors `[B, count, links]` -> sums of squares and magnitudes `[B, count, 2]`.
pub(super) struct Deviations;

impl Kernel<3> for Deviations {
    const NAME: &'static str = "deviations";
    fn run<F: Float>(&self, inputs: [View<F>; 3]) -> Result<(Vec<F>, Vec<usize>)> {
        let sizes = Sizes::of(inputs[0].shape, inputs[1].shape, inputs[2].shape)?;
        let (batch, count) = (inputs[0].shape[0], sizes.count);
        let mut out = vec![F::ZERO; batch * 2 * count];
        fill(&mut out, 2 * count, |b, out| {
            let sample = Sample::new(b, &sizes, inputs);
            let mut sums = [0f64; 2 * MOST]; // of the blocks' sums
            let mut block = [F::ZERO; BLOCK];
            for start in (0..sizes.n).step_by(BLOCK) {
                let block = &mut block[..BLOCK.min(sizes.n - start)];
                for m in 0..count {
                    sample.deviation(m, start, block);
                    sums[2 * m] += dot(block, block).to_f64();
                    sums[2 * m + 1] += sum_pairs(block, block, |r, _| r.larger(-r)).to_f64();
                }
            }
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = F::of(sum));
        });
        Ok((out, vec![batch, count, 2]))
    }
}

/// (v, others, factors, d `[B, count, 2]`) -> the gradient of v.
struct Backward;

impl Kernel<4> for Backward {
    const NAME: &'static str = "deviations";
    fn run<F: Float>(&self, [v, others, factors, d]: [View<F>; 4]) -> Result<(Vec<F>, Vec<usize>)> {
        let sizes = Sizes::of(v.shape, others.shape, factors.shape)?;
        let mut out = vec![F::ZERO; v.data.len()];
        fill(&mut out, sizes.n, |b, dv| {
            let sample = Sample::new(b, &sizes, [v, others, factors]);
            let mut block = [F::ZERO; BLOCK];
            for start in (0..sizes.n).step_by(BLOCK) {
                let dv = &mut dv[start..sizes.n.min(start + BLOCK)];
                let block = &mut block[..dv.len()];
                for m in 0..sizes.count {
                    sample.deviation(m, start, block);
                    let [square, magnitude] = [0, 1].map(|i| sample.own(m) * d.data[(b * sizes.count + m) * 2 + i]);
                    for (dv, &r) in dv.iter_mut().zip(&*block) {
                        let sign = F::of(f64::from(i8::from(r > F::ZERO) - i8::from(r < F::ZERO)));
                        *dv += (square + square) * r + magnitude * sign;
                    }
                }
            }
        });
        Ok((out, v.shape.to_vec()))
    }
}

impl Differentiable<3> for Deviations {
    fn backward(&self, [v, others, factors]: [&Tensor; 3], _: &Tensor, d: &Tensor) -> Result<[Option<Tensor>; 3]> {
        Ok([Some(run(&Backward, [v, others, factors, d])?), None, None])
    }
}

/// Of the deviations `r_m = factors[m, 0] (v - others[0]) + sum_k factors[m, k] (others[k - 1] - others[k])` of each sample the
/// sums of squares and of magnitudes, `[B, count, 2]`: v `[B, ..]`, others `[B, links, ..]`, factors `[B, count, links]`, of
/// each four at most. Differentiable in v; on a GPU in f32 only.
///
/// Differences are formed first: of equal tensors they are exactly 0, and of close ones exact.
///
/// # Errors
/// Shapes do not fit, or the others or the factors want a gradient.
pub fn deviations(v: &Tensor, others: &Tensor, factors: &Tensor) -> Result<Tensor> {
    refuse_tracked("deviations", &[others, factors])?;
    Sizes::of(v.dims(), others.dims(), factors.dims())?;
    apply3(Deviations, v, others, factors)
}
