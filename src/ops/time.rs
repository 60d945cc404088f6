//! The time as sines and cosines.

use candle_core::{DType, Result, Tensor};

/// Cosines, then sines, of 1000 t times `half` frequencies from 1 down to almost 1e-4: t `[B]` in [0, 1] to
/// `[B, 2 half]`, f32, without a graph (diffusers `get_timestep_embedding` with `flip_sin_to_cos`, embeddings.py of
/// v0.33.1). The factor 1000 stands here and nowhere else.
pub fn time_features(t: &Tensor, half: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return super::cuda::time_features(t, half);
    }
    // In f32 as there: 1000 t times the rounding of a frequency is 1e-5 of an angle, and the weights know these angles.
    let frequency = |i: usize| f64::from(-(10_000f64.ln()) as f32 * i as f32 / half as f32).exp() as f32;
    let mut features = Vec::new();
    for t in t.to_dtype(DType::F64)?.to_vec1::<f64>()? {
        let angle = |i: usize| f64::from((1000.0 * t) as f32 * frequency(i));
        features.extend((0..half).map(|i| libm::cos(angle(i)) as f32));
        features.extend((0..half).map(|i| libm::sin(angle(i)) as f32));
    }
    Tensor::from_vec(features, (t.dim(0)?, 2 * half), t.device())
}
