//! What base models in pixel space have in common: their samples are pictures.

use super::{BaseFiles, Codec, ModelConfig, Pipeline};
use crate::error::Result;
use crate::model::files::Weights;
use crate::model::{Model, StartingParams};
use crate::params::{ParamSet, Role, Spec};
use candle_core::{Device, Tensor};
use std::path::Path;

/// The model with the weights of `config.path`, or the `embedded` ones.
///
/// # Errors
/// The file cannot be read, or does not fit the model.
pub(super) fn open(config: &ModelConfig, model: Model, embedded: &'static [u8]) -> Result<BaseFiles> {
    let weights = match &config.path {
        Some(path) => Weights::open(path)?,
        None => Weights::embedded(Path::new("the embedded base model"), embedded)?,
    };
    let specs = model.specs();
    let base = specs.iter().flat_map(|specs| specs.iter()).filter(|spec| spec.role != Role::Adapter);
    weights.check(base.map(|spec: &Spec| (spec.name.as_str(), spec.shape.as_slice())), |_| false)?;
    Ok(BaseFiles { model, weights, transformer: None })
}

/// The pipeline of an opened model.
pub(super) fn pipeline(
    files: BaseFiles,
    codec: Box<dyn Codec>,
    config: &ModelConfig,
    seed: u64,
    device: &Device,
) -> Pipeline {
    let BaseFiles { model, weights, .. } = files;
    let base_digest = weights.digest();
    let base = Box::new(StartingParams::new(&model, weights, config.dtype.dtype(), seed, device));
    Pipeline { model, base, base_digest, device: device.clone(), codec }
}

/// The pipeline of a model with random weights.
pub(super) fn random(model: Model, codec: Box<dyn Codec>, seed: u64, device: &Device) -> Result<Pipeline> {
    let base = Box::new(ParamSet::init(&model.specs(), seed, device)?);
    Ok(Pipeline { model, base, base_digest: String::new(), device: device.clone(), codec })
}

/// Samples x0, pixel values in [-1, 1], to pictures in [0, 1].
pub(super) fn decode(x0: &Tensor) -> Result<Tensor> {
    Ok(x0.affine(0.5, 0.5)?.clamp(0f32, 1f32)?)
}

/// Pictures in [0, 1] to samples x0: the inverse of the decoding.
///
/// # Errors
/// Only those of tensors that are no numbers.
pub fn encode_pictures(pictures: &Tensor) -> Result<Tensor> {
    Ok(pictures.affine(2.0, -1.0)?)
}
