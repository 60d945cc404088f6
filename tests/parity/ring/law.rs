//! The data: eight equally likely Gaussians on a ring, numbered by their angle. The reward of a point is the cosine of its
//! angle, so mode 0 is the best and mode 4 the worst.

use candle_core::{Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::rng::{Purpose, Stream};
use std::f64::consts::TAU;

pub const MODES: usize = 8;
const RADIUS: f64 = 2.0;
const DEVIATION: f64 = 0.15;

/// Seed of everything random. By the seed the methods leave the ring more or less: of 11 to 14 they end 0.15 to 0.27 off it
/// (docs/LOG.md); the bounds are those of one seed.
pub const SEED: u64 = 14;

fn centre(mode: usize) -> [f64; 2] {
    let angle = TAU * mode as f64 / MODES as f64;
    [RADIUS * angle.cos(), RADIUS * angle.sin()]
}

/// The reward at a mode's centre.
pub fn reward_of(mode: usize) -> f64 {
    centre(mode)[0] / RADIUS
}

/// Points of the ring for update `step` of the pretraining, `[n, 2, 1, 1]`.
pub fn draw(step: u64, n: usize) -> Result<Tensor> {
    let stream = |index| Stream::new(SEED, Purpose::Pretrain, [step, 0, 0, index]);
    let modes = stream(0);
    let around = stream(1).normals(2 * n);
    let values = around.iter().enumerate().map(|(i, z)| {
        let centre = centre(modes.below(i as u32 / 2, MODES));
        (centre[i % 2] + DEVIATION * f64::from(*z)) as f32
    });
    Ok(Tensor::from_vec(values.collect(), (n, 2, 1, 1), &Device::Cpu)?)
}

/// The reward of every point.
pub fn rewards(x0: &Tensor) -> Result<Vec<f64>> {
    Ok(points(x0)?.iter().map(|[x, y]| x / x.hypot(*y)).collect())
}

fn points(x0: &Tensor) -> Result<Vec<[f64; 2]>> {
    let rows = x0.flatten_from(1)?.to_vec2::<f32>()?;
    Ok(rows.iter().map(|row| [f64::from(row[0]), f64::from(row[1])]).collect())
}

/// What samples look like.
#[derive(Debug, Clone)]
pub struct Look {
    /// Mean reward.
    pub reward: f64,
    /// Share of the samples that are nearest to each mode.
    pub shares: [f64; MODES],
    /// Mean distance from the ring.
    pub off_ring: f64,
    /// Mean distance from the nearest mode's centre: for the data, deviation * sqrt(pi / 2) = 0.188.
    pub off_mode: f64,
}

impl Look {
    pub fn new(x0: &Tensor) -> Result<Self> {
        let (points, rewards) = (points(x0)?, rewards(x0)?);
        let n = points.len() as f64;
        let mut look =
            Self { reward: rewards.iter().sum::<f64>() / n, shares: [0.0; MODES], off_ring: 0.0, off_mode: 0.0 };
        for [x, y] in points {
            let distance = |mode: usize| (x - centre(mode)[0]).hypot(y - centre(mode)[1]);
            let nearest = (0..MODES).fold(0, |best, mode| if distance(mode) < distance(best) { mode } else { best });
            look.shares[nearest] += 1.0 / n;
            look.off_mode += distance(nearest) / n;
            look.off_ring += (x.hypot(y) - RADIUS).abs() / n;
        }
        Ok(look)
    }

    /// log(share / share before) of each mode: R / b and a constant, if the law is the exponential tilt of the one before.
    pub fn tilt(&self, before: &Self) -> [f64; MODES] {
        std::array::from_fn(|mode| (self.shares[mode] / before.shares[mode]).ln())
    }
}

/// Pearson's.
pub fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let moment = |f: &dyn Fn(f64, f64) -> f64| a.iter().zip(b).map(|(a, b)| f(a - mean_a, b - mean_b)).sum::<f64>();
    moment(&|a, b| a * b) / (moment(&|a, _| a * a) * moment(&|_, b| b * b)).sqrt()
}
