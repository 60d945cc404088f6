//! Weights that are still Python pickles: the original files of some reward models come in no other form.
//!
//! candle reads the pickle's own small language without running any of it.

use super::finite::not_finite;
use super::{Weights, find};
use crate::error::{Error, Result};
use crate::fs;
use candle_core::pickle::PthTensors;
use candle_core::{DType, Device, Tensor};
use std::io::BufReader;
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
        let nested = tensors(path, Some("state_dict")).ok().filter(|tensors| !tensors.tensor_infos().is_empty());
        let tensors = match nested {
            Some(tensors) => tensors,
            None => tensors(path, None).map_err(|e| {
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

/// Bytes of the pickle in an archive: names, shapes and places of tensors, about 200 bytes each, and not their values.
const LONGEST: u64 = 8 << 20;

/// Bytes of the stack of the thread that reads a pickle. What is nested is dropped by recursion, and each level takes two
/// bytes of the pickle at least: room for 100 bytes at each. Pages that are not touched take no memory.
const STACK: usize = 50 * LONGEST as usize;

/// The tensors of an archive, under `key` or at the top, by a thread whose stack no nesting exhausts.
fn tensors(path: &Path, key: Option<&str>) -> std::result::Result<PthTensors, String> {
    let file = fs::regular(path).map_err(|e| e.to_string())?;
    let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(|e| e.to_string())?;
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(|e| e.to_string())?;
        if entry.name().is_ok_and(|name| name.ends_with("data.pkl")) && entry.size() > LONGEST {
            return Err(format!("its pickle has {} bytes; that of a model has at most {LONGEST}", entry.size()));
        }
    }
    std::thread::scope(|scope| {
        let read = || PthTensors::new(path, key).map_err(|e| e.to_string());
        let reader = std::thread::Builder::new().name("pickle".into()).stack_size(STACK).spawn_scoped(scope, read);
        let reader = reader.map_err(|e| format!("no thread to read it: {e}"))?;
        reader.join().unwrap_or_else(|_| Err("its pickle is damaged".into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// An archive of torch.save with this pickle in it and nothing else.
    fn archive(folder: &Path, pickle: &[u8]) -> PathBuf {
        let path = folder.join("weights.pth");
        let mut archive = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
        let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        archive.start_file("archive/data.pkl", stored).unwrap();
        archive.write_all(pickle).unwrap();
        archive.finish().unwrap();
        path
    }

    #[test]
    fn a_pickle_of_any_depth_or_length_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let read = |pickle: &[u8]| match AnyWeights::open(&archive(folder.path(), pickle)) {
            Ok(_) => panic!("this holds no tensors"),
            Err(e) => e.to_string(),
        };
        // Protocol 2; lists within lists, closed by APPEND.
        const DEPTH: usize = 1_000_000;
        let nested = [&b"\x80\x02"[..], &b"]".repeat(DEPTH), &b"a".repeat(DEPTH - 1), b"."].concat();
        assert!(read(&nested).contains("weights.pth"), "{}", read(&nested));
        let long = [&b"\x80\x02"[..], &b"N0".repeat(LONGEST as usize), b"N."].concat();
        assert!(read(&long).contains("its pickle has"), "{}", read(&long));
    }
}
