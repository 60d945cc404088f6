//! Weights that are still Python pickles: the original files of some reward models come in no other form.
//!
//! candle reads the pickle's own small language without running any of it.

use super::finite::not_finite;
use super::{Weights, find};
use crate::error::{Error, Result};
use candle_core::pickle::PthTensors;
use candle_core::{DType, Device, Tensor};
use std::path::{Path, PathBuf};

/// The tensors of a model's file or folder: safetensors, or `torch.save`'s archives (`.pt`, `.pth`, `.bin`).
pub enum AnyWeights {
    /// Safetensors.
    Safetensors(Weights),
    /// A pickle.
    Pickle {
        /// The file.
        path: PathBuf,
        /// Its tensors, not read yet.
        tensors: PthTensors,
    },
}

impl AnyWeights {
    /// Opens a file, or a folder with safetensors or else a single pickle. In a pickle the tensors lie at the top, or under
    /// `state_dict`.
    ///
    /// # Errors
    /// [`Error::File`]: there is no such file, or it is damaged, or older than PyTorch 1.6; a folder holds several pickles.
    pub fn open(path: &Path) -> Result<Self> {
        let Some(pickle) = find::pickle_of(path)? else { return Ok(Self::Safetensors(Weights::open(path)?)) };
        let path = pickle.as_path();
        let file = |message: String| Error::File { path: path.to_path_buf(), message };
        if !path.is_file() {
            return Err(file("there is no such file; give an existing one".into()));
        }
        // A file without that key is refused first, and then taken as it is.
        let nested =
            PthTensors::new(path, Some("state_dict")).ok().filter(|tensors| !tensors.tensor_infos().is_empty());
        let tensors = match nested {
            Some(tensors) => tensors,
            None => PthTensors::new(path, None).map_err(|e| {
                file(format!(
                    "cannot be read as a file of torch.save ({e}); download it again, or convert it to safetensors"
                ))
            })?,
        };
        if tensors.tensor_infos().is_empty() {
            return Err(file("holds no tensors, neither at the top nor under state_dict".into()));
        }
        Ok(Self::Pickle { path: path.to_path_buf(), tensors })
    }

    /// The shape of a tensor; none if there is none of this name.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self {
            Self::Safetensors(weights) => weights.shape(name).map(<[usize]>::to_vec),
            Self::Pickle { tensors, .. } => tensors.tensor_infos().get(name).map(|info| info.layout.dims().to_vec()),
        }
    }

    /// Reads a tensor and converts it.
    ///
    /// # Errors
    /// There is no tensor of this name, or it cannot be read.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        match self {
            Self::Safetensors(weights) => weights.tensor(name, dtype, device),
            Self::Pickle { tensors, .. } => {
                let tensor = tensors.get(name).map_err(|e| self.error(format!("{name} cannot be read: {e}")))?;
                let tensor = tensor.ok_or_else(|| self.error(format!("lacks {name}")))?;
                let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                    return Err(self.error(not_finite(name, at, values.len())));
                }
                Ok(tensor.to_dtype(dtype)?.contiguous()?.to_device(device)?)
            }
        }
    }

    /// An error about the file.
    pub fn error(&self, message: impl Into<String>) -> Error {
        match self {
            Self::Safetensors(weights) => weights.error(message),
            Self::Pickle { path, .. } => Error::File { path: path.clone(), message: message.into() },
        }
    }
}
