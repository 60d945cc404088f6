//! A one-dimensional mixture of Gaussians, the law for which velocity and exponential tilt are known in closed form.

/// sum weight_i N(mean_i, variance_i).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mixture {
    pub weight: [f64; 3],
    pub mean: [f64; 3],
    pub variance: [f64; 3],
}

/// The old policy's law.
pub const OLD: Mixture = Mixture { weight: [0.3, 0.5, 0.2], mean: [-2.0, 0.5, 2.5], variance: [0.25, 0.16, 0.36] };

/// k of the tilt exp(k x0): the reward is x0.
pub const TILT: f64 = 0.5;

/// Density of N(mean, variance).
pub fn gaussian(x: f64, mean: f64, variance: f64) -> f64 {
    (-(x - mean) * (x - mean) / (2.0 * variance)).exp() / (2.0 * std::f64::consts::PI * variance).sqrt()
}

impl Mixture {
    /// Mean and variance.
    pub fn moments(&self) -> (f64, f64) {
        let mean: f64 = (0..3).map(|i| self.weight[i] * self.mean[i]).sum();
        let square: f64 = (0..3).map(|i| self.weight[i] * (self.variance[i] + self.mean[i] * self.mean[i])).sum();
        (mean, square - mean * mean)
    }

    /// The parts' shares of E exp(k x0).
    pub fn tilted_weights(&self) -> [f64; 3] {
        let exponent = |i: usize| TILT * self.mean[i] + TILT * TILT * self.variance[i] / 2.0;
        std::array::from_fn(|i| self.weight[i] * exponent(i).exp())
    }

    /// E[u | x_t].
    pub fn velocity(&self, t: f64, x_t: f64) -> f64 {
        let (mut sum, mut total) = (0.0, 0.0);
        for i in 0..3 {
            let variance = (1.0 - t) * (1.0 - t) * self.variance[i] + t * t;
            let centred = x_t - (1.0 - t) * self.mean[i];
            let v = (t - (1.0 - t) * self.variance[i]) / variance * centred - self.mean[i];
            let p = self.weight[i] * gaussian(x_t, (1.0 - t) * self.mean[i], variance);
            (sum, total) = (sum + p * v, total + p);
        }
        sum / total
    }
}
