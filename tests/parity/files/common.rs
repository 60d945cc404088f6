//! The small transformer and its recorded inputs.

use candle_core::{DType, Device, Tensor};
use flowrl_dist::engine;
use flowrl_dist::model::Model;
use flowrl_dist::params::ParamSet;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub type Tensors = HashMap<String, Tensor>;

pub fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var_os("FLOWRL_FIXTURES")
        .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
    folder.join(name)
}

pub fn tensors(path: &Path) -> Tensors {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

pub fn write(path: &Path, tensors: &Tensors) {
    safetensors::serialize_to_file(tensors, None, path).unwrap();
}

/// Height and width of the recorded latents.
pub const LATENT: (usize, usize) = (8, 8);

/// The velocity on the inputs recorded in `io`.
pub fn velocity(model: &Model, params: &ParamSet, io: &Tensors) -> Tensor {
    let t = (io["in.timestep"].to_dtype(DType::F64).unwrap() / 1000.0).unwrap().to_dtype(DType::F32).unwrap();
    let conditioning = [io["in.encoder_hidden_states"].clone(), io["in.pooled"].clone()];
    engine::velocity(model, params, &io["in.xt"], &t, &conditioning).unwrap()
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference over the largest recorded value.
pub fn max_error(ours: &Tensor, recorded: &Tensor) -> f64 {
    assert_eq!(ours.dims(), recorded.dims());
    let pairs = values(ours).into_iter().zip(values(recorded));
    let (error, scale) = pairs.fold((0f64, 0f64), |(error, scale), (a, b)| {
        (error.max((f64::from(a) - f64::from(b)).abs()), scale.max(f64::from(b).abs()))
    });
    error / scale
}
