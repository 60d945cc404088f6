//! Where the values of parameters are taken from, whole or in part.

use super::{Entry, Layout, ParamSet, Spec, StageParams};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// A source of parameter values that can be read in part: tensors in memory, or files of which only the part is read.
pub trait Values: Send + Sync {
    /// Elements `range` of a parameter, `[range.len()]`.
    ///
    /// # Errors
    /// The parameter is not there.
    fn elements(&self, entry: &Entry, range: Range<usize>) -> Result<Tensor>;

    /// The type of the base model's elements; adapters have that of [`Role::dtype`](super::Role::dtype).
    fn dtype(&self) -> DType;

    /// Where the elements lie.
    fn device(&self) -> Device;
}

impl Values for ParamSet {
    fn elements(&self, entry: &Entry, range: Range<usize>) -> Result<Tensor> {
        let tensor = self.stage(entry.stage).of(entry)?.detach();
        Ok(tensor.flatten_all()?.narrow(0, range.start, range.len())?)
    }

    fn dtype(&self) -> DType {
        self.first().map_or(DType::F32, Tensor::dtype)
    }

    fn device(&self) -> Device {
        self.first().map_or(Device::Cpu, |tensor| tensor.device().clone())
    }
}

/// The flat vector `[total]` of the entries' layout.
impl Values for Tensor {
    fn elements(&self, entry: &Entry, range: Range<usize>) -> Result<Tensor> {
        Ok(self.detach().narrow(0, entry.offset + range.start, range.len())?)
    }

    fn dtype(&self) -> DType {
        Tensor::dtype(self)
    }

    fn device(&self) -> Device {
        Tensor::device(self).clone()
    }
}

impl ParamSet {
    /// All parameters of `stages`, whole.
    pub fn read(stages: &[&[Spec]], values: &dyn Values) -> Result<Self> {
        let mut set = Self { stages: stages.iter().map(|specs| StageParams::absent(specs.len())).collect() };
        for entry in &Layout::all(stages).entries {
            let tensor = values.elements(entry, 0..entry.len)?.reshape(entry.shape.as_slice())?;
            set.stages[entry.stage].put(entry, tensor);
        }
        Ok(set)
    }

    fn first(&self) -> Option<&Tensor> {
        self.stages.iter().flat_map(|stage| stage.iter()).map(|(_, tensor)| tensor).next()
    }
}
