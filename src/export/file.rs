//! Safetensors files written one tensor at a time, the same bytes for the same values.

use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use safetensors::tensor::{Dtype, View};
use serde_json::{Map, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// A tensor that will be written.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Its name in the file.
    pub name: String,
    /// Its type there.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Planned {
    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }
}

/// Writes the tensors in the order given, each asked of `tensor` when its turn comes, and makes the file durable.
///
/// # Errors
/// A tensor cannot be made or is not as planned, or the file cannot be written.
pub fn write(path: &Path, tensors: &[Planned], mut tensor: impl FnMut(&Planned) -> Result<Tensor>) -> Result<()> {
    let file = File::create(path).map_err(Error::io(path))?;
    let mut out = BufWriter::new(file);
    out.write_all(&header(tensors)).map_err(Error::io(path))?;
    for planned in tensors {
        let made = tensor(planned)?.to_dtype(planned.dtype)?;
        if made.dims() != planned.shape {
            let (name, made, shape) = (&planned.name, made.dims(), &planned.shape);
            return Err(Error::Failed(format!("{name} was to be written as {shape:?}, but is {made:?}")));
        }
        out.write_all(&View::data(&made)).map_err(Error::io(path))?;
    }
    out.into_inner().map_err(|e| e.into_error()).and_then(|file| file.sync_all()).map_err(Error::io(path))
}

/// The header: its length in 8 bytes, then JSON, padded to a multiple of 8. `format` is what transformers asks for.
fn header(tensors: &[Planned]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut end = 0;
    for planned in tensors {
        let start = end;
        end += planned.bytes();
        let dtype: Dtype = planned.dtype.into();
        let entry = json!({ "dtype": dtype, "shape": planned.shape, "data_offsets": [start, end] });
        map.insert(planned.name.clone(), entry);
    }
    let mut json = serde_json::Value::Object(map).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat()
}

/// Writes a JSON file, with an end of line.
pub fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_string_pretty(json).map_err(|e| Error::Failed(format!("no JSON: {e}")))?;
    std::fs::write(path, text + "\n").map_err(Error::io(path))
}

/// Copies a file and makes the copy durable.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to).map_err(Error::io(from))?;
    File::open(to).and_then(|file| file.sync_all()).map_err(Error::io(to))
}
