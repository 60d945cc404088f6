//! The parameters that a run starts from.

use super::Model;
use super::files::Weights;
use crate::error::{Error, Result};
use crate::params::{Entry, Layout, Role, Spec, Values};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// A base model's weights in files, and adapters beside them; nothing is read before it is asked for.
pub struct StartingParams {
    specs: Vec<Vec<Spec>>,
    weights: Weights,
    adapters: Adapters,
    dtype: DType,
    device: Device,
}

/// Where the adapters' values come from.
enum Adapters {
    /// Drawn with this seed.
    Drawn(u64),
    /// The flat vector of this layout, f32.
    Given(Layout, Tensor),
}

impl StartingParams {
    /// The weights, which have been checked to be the model's, as `dtype` on `device`; adapters, f32, are drawn with `seed`.
    pub fn new(model: &Model, weights: Weights, dtype: DType, seed: u64, device: &Device) -> Self {
        let specs = model.specs().into_iter().map(<[Spec]>::to_vec).collect();
        Self { specs, weights, adapters: Adapters::Drawn(seed), dtype, device: device.clone() }
    }

    /// The same with all adapters from the flat vector of `layout`, `[total]`.
    pub fn with_adapters(self, layout: Layout, flat: Tensor) -> Self {
        Self { adapters: Adapters::Given(layout, flat), ..self }
    }
}

impl Values for StartingParams {
    fn elements(&self, entry: &Entry, range: Range<usize>) -> Result<Tensor> {
        let spec = &self.specs[entry.stage][entry.slot];
        match (spec.role, &self.adapters) {
            (Role::Base | Role::Buffer, _) => self.weights.part(&spec.name, range, self.dtype, &self.device),
            (Role::Adapter, Adapters::Drawn(seed)) => {
                Ok(spec.initial(*seed, &self.device)?.flatten_all()?.narrow(0, range.start, range.len())?)
            }
            (Role::Adapter, Adapters::Given(layout, flat)) => {
                let given = layout.entries.iter().find(|e| (e.stage, e.slot) == (entry.stage, entry.slot));
                let given = given.ok_or_else(|| Error::Failed(format!("{} is in no adapter", spec.name)))?;
                flat.elements(given, range)
            }
        }
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn device(&self) -> Device {
        self.device.clone()
    }
}
