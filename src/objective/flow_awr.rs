//! FlowAWR: regression of the x0 estimate to the old policy's, moved towards (or away from) the sample.

use super::{Frozen, Point, Terms, adaptive_scale, distance, estimate, mean_dims, promised};
use crate::error::Result;
use crate::flow::column;
use candle_core::Tensor;

/// The released form (Fuzm7/FlowAWR, scripts/train_awr_sd3.py at 05e993aa):
/// `f_target = f_old + A (x0 - f_old)`, `loss = mean (f - f_target)^2 / w + kl mean (v - v_ref)^2`,
/// `w = max(mean |f - x0|, 1e-5)` outside the graph.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowAwr {
    /// Weight of the distance from the base model.
    pub kl_coef: f64,
    /// Whether the loss is divided by w.
    pub adaptive: bool,
}

impl FlowAwr {
    pub(super) fn terms(&self, point: &Point, v: &Tensor, frozen: &Frozen) -> Result<Terms> {
        let f = estimate(point, v)?; // [B, C, H, W]
        let f_old = estimate(point, promised(&frozen.old, "old policy's")?)?;
        let pull = (&point.x0 - &f_old)?.broadcast_mul(&column(&point.advantage)?)?;
        let target = (f_old + pull)?;
        let policy = (mean_dims(&(&f - target)?.sqr()?)? / adaptive_scale(point, &f, self.adaptive)?)?; // [B]
        let kl = match self.kl_coef > 0.0 {
            true => (distance(v, promised(&frozen.reference, "base model's")?)? * self.kl_coef)?,
            false => policy.zeros_like()?,
        };
        Ok(Terms { loss: (&policy + &kl)?, policy, kl })
    }
}
