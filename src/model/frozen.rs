//! What models share that are run and never trained: nothing here needs a gradient, so candle's operations serve.

use super::files::Weights;
use crate::error::{Error, Result};
use crate::fs;
use crate::params::{Init, ParamSet, Slot, Spec, SpecList, StageParams};
use candle_core::{D, DType, Device, Tensor};
use serde::de::DeserializeOwned;
use std::path::Path;

/// The config.json beside a model's weights in `folder`, as transformers writes it; `kinds` are the model types that
/// can be read.
///
/// # Errors
/// [`Error::File`]: there is none, it is of another kind of model, or it wants what this program does not have.
pub(super) fn read_config<T: DeserializeOwned>(folder: &Path, kinds: &[&str]) -> Result<T> {
    let path = folder.join("config.json");
    let error = |message: String| Error::File { path: path.clone(), message };
    let text = fs::read_to_string(&path)?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| error(format!("is not JSON: {e}")))?;
    match json.get("model_type").and_then(|kind| kind.as_str()) {
        Some(kind) if kinds.contains(&kind) => {}
        kind => {
            let (kind, wanted) = (kind.unwrap_or("none"), kinds.join(" or "));
            return Err(error(format!("has model_type {kind}, not {wanted}; give the folder of such a model")));
        }
    }
    serde_path_to_error::deserialize(json).map_err(|e| error(format!("cannot be used: {}: {}", e.path(), e.inner())))
}

/// Whether the files hold the tensors that a model declares, by their headers; they may hold more if `ignored` says so.
///
/// # Errors
/// [`Error::File`] with every tensor that is missing, unknown, of another shape or of a type that is no weight's.
pub(super) fn check(weights: &Weights, specs: &[Spec], ignored: impl Fn(&str) -> bool) -> Result<()> {
    weights.check(specs.iter().map(|spec| (spec.name.as_str(), spec.shape.as_slice())), ignored)
}

/// Reads the tensors that a model declares, converted to `dtype`; the file may hold more if `ignored` says so.
///
/// # Errors
/// As [`check`], or a value is not finite.
pub(super) fn load(
    weights: &Weights,
    specs: &[Spec],
    ignored: impl Fn(&str) -> bool,
    dtype: DType,
    device: &Device,
) -> Result<StageParams> {
    check(weights, specs, ignored)?;
    let set = ParamSet::build(&[specs], |spec| weights.tensor(&spec.name, dtype, device))?;
    Ok(set.stage(0).clone())
}

/// The rows of `table` `[V, D]` that the tokens of each text name: `[B, T, D]`.
///
/// # Errors
/// The texts have unequal lengths, or a token is not in the table.
pub(super) fn embed(table: &Tensor, ids: &[Vec<u32>]) -> Result<Tensor> {
    let (rows, width) = table.dims2()?;
    let tokens = ids.first().map_or(0, Vec::len);
    if tokens == 0 || ids.iter().any(|text| text.len() != tokens) {
        return Err(Error::Failed("texts of a batch need one length, at least one token".into()));
    }
    let flat = ids.concat();
    if let Some(id) = flat.iter().find(|&&id| id as usize >= rows) {
        return Err(Error::Usage(format!(
            "the tokenizer made the token {id}, but the model knows {rows}; take the tokenizer that belongs to the model"
        )));
    }
    let flat = Tensor::from_vec(flat, ids.len() * tokens, table.device())?;
    Ok(table.index_select(&flat, 0)?.reshape((ids.len(), tokens, width))?)
}

/// softmax(scale q k^T + bias) v: q, k, v `[B, T, H, d]`, bias broadcastable to `[B, H, T, T]`, f32; result
/// `[B, T, H d]`. The softmax is taken in f32.
pub(super) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, bias: Option<&Tensor>) -> Result<Tensor> {
    let heads_first = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let (q, k, v) = (heads_first(q)?, heads_first(k)?, heads_first(v)?); // [B, H, T, d]
    let scores = (q.matmul(&k.t()?)?.to_dtype(DType::F32)? * scale)?; // [B, H, T, T]
    let scores = bias.map_or(Ok(scores.clone()), |bias| scores.broadcast_add(bias))?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?.to_dtype(v.dtype())?;
    Ok(weights.matmul(&v)?.transpose(1, 2)?.flatten_from(2)?)
}

/// LayerNorm with weight and bias, computed in f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerNorm {
    weight: Slot,
    bias: Slot,
    eps: f64,
}

impl LayerNorm {
    /// Declares `name.weight` and `name.bias`, `[width]`.
    pub fn new(specs: &mut SpecList, name: &str, width: usize, eps: f64) -> Self {
        Self {
            weight: specs.base(&format!("{name}.weight"), &[width], Init::Ones),
            bias: specs.base(&format!("{name}.bias"), &[width], Init::Zeros),
            eps,
        }
    }

    /// x `[.., D]`, normalised over its last dimension.
    pub fn forward(&self, params: &StageParams, x: &Tensor) -> Result<Tensor> {
        let wide = x.to_dtype(DType::F32)?;
        let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?;
        let normal = centred.broadcast_div(&deviation)?.to_dtype(x.dtype())?;
        Ok(normal.broadcast_mul(params.get(self.weight)?)?.broadcast_add(params.get(self.bias)?)?)
    }
}
