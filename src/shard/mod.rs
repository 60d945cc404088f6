//! How the trainable parameters, their gradients and their state are shared out among the ranks.
//!
//! ```text
//! flat vector    [total]        | stage 0 | stage 1 | ...       in the order of declaration (crate::params::Layout)
//! padded         [parts * S]    | stage 0 00| stage 1 0| ...    each stage with zeros to a multiple of `parts`
//! shard of part r     [S]       r-th part of stage 0, r-th part of stage 1, ...
//! ```
//! So a stage is gathered and reduced by itself, by one collective of equal parts, beside the work of the next one.

mod collect;
mod gradients;
mod parts;
mod weights;

pub use collect::{Reduction, gather};
pub use gradients::Gradients;
pub use parts::{Gathered, PartSet, Parts};
pub use weights::{Coming, Weights};

use crate::error::Result;
use crate::params::{Layout, Values};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What the ranks share out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharding {
    /// Nothing: every rank holds all state and takes every step whole.
    None,
    /// Master parameters, moments, old policy and EMA.
    Optimizer,
    /// These and the model's weights: a stage is gathered when it runs, one stage ahead, and freed after it.
    Full,
}

impl Sharding {
    /// Into how many parts the state is cut on `ranks` ranks.
    pub fn parts(self, ranks: usize) -> usize {
        match self {
            Sharding::None => 1,
            Sharding::Optimizer | Sharding::Full => ranks,
        }
    }
}

/// The flat trainable parameters, stage by stage in equal parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Partition {
    parts: usize,
    pieces: Vec<Piece>,
}

/// One stage.
#[derive(Debug, Clone, PartialEq)]
struct Piece {
    /// Its elements of the flat vector.
    flat: Range<usize>,
    /// Elements of each part.
    part: usize,
    /// Where it begins in a shard.
    offset: usize,
}

impl Partition {
    /// The parameters of `layout` in `parts` parts.
    pub fn new(layout: &Layout, parts: usize) -> Self {
        let stages = layout.stages();
        let (mut pieces, mut offset) = (Vec::with_capacity(stages), 0);
        for stage in 0..stages {
            let start = pieces.last().map_or(0, |piece: &Piece| piece.flat.end);
            let len: usize = layout.stage(stage).map(|e| e.len).sum();
            let part = len.div_ceil(parts);
            pieces.push(Piece { flat: start..start + len, part, offset });
            offset += part;
        }
        Self { parts, pieces }
    }

    /// Number of parts.
    pub fn parts(&self) -> usize {
        self.parts
    }

    /// Stages that may have trainable parameters.
    pub fn stages(&self) -> usize {
        self.pieces.len()
    }

    /// Elements of the flat vector.
    pub fn total(&self) -> usize {
        self.pieces.last().map_or(0, |piece| piece.flat.end)
    }

    /// Length S of a shard, with its padding.
    pub fn shard_len(&self) -> usize {
        self.pieces.last().map_or(0, |piece| piece.offset + piece.part)
    }

    /// Length of the padded vector, `parts * S`.
    pub fn padded_len(&self) -> usize {
        self.parts * self.shard_len()
    }

    /// A stage's elements of the flat vector.
    pub fn flat(&self, stage: usize) -> Range<usize> {
        self.pieces[stage].flat.clone()
    }

    /// A stage's elements of the padded vector.
    pub fn padded(&self, stage: usize) -> Range<usize> {
        let Piece { part, offset, .. } = self.pieces[stage];
        self.parts * offset..self.parts * (offset + part)
    }

    /// A stage's elements of a shard.
    pub fn in_shard(&self, stage: usize) -> Range<usize> {
        let Piece { part, offset, .. } = self.pieces[stage];
        offset..offset + part
    }

    /// The elements of the flat vector that part `index` holds of a stage, and where they begin in its shard.
    fn own(&self, stage: usize, index: usize) -> (Range<usize>, usize) {
        let Piece { flat, part, offset } = &self.pieces[stage];
        let at = |index: usize| (flat.start + index * part).min(flat.end);
        (at(index)..at(index + 1), *offset)
    }

    /// The ranges of the flat vector that part `index` holds, in order.
    pub fn owned(&self, index: usize) -> Vec<Range<usize>> {
        let ranges = (0..self.stages()).map(|stage| self.own(stage, index).0);
        ranges.filter(|range| !range.is_empty()).collect()
    }

    /// Part `index` of the flat vector `[total]`, with padding `[S]`.
    pub fn cut(&self, flat: &Tensor, index: usize) -> Result<Tensor> {
        let shard = self.padding(flat.dtype(), flat.device())?;
        for (range, place) in (0..self.stages()).map(|stage| self.own(stage, index)) {
            if !range.is_empty() {
                shard.slice_set(&flat.narrow(0, range.start, range.len())?, 0, place)?;
            }
        }
        Ok(shard)
    }

    /// Part `index` of the parameters of `layout`, with padding `[S]`, of type `dtype`, parameter by parameter: of `values`
    /// nothing else is read.
    pub fn read(&self, values: &dyn Values, layout: &Layout, index: usize, dtype: DType) -> Result<Tensor> {
        let shard = self.padding(dtype, &values.device())?;
        for entry in &layout.entries {
            let (own, place) = self.own(entry.stage, index);
            let (start, end) = (own.start.max(entry.offset), own.end.min(entry.offset + entry.len));
            if start < end {
                let elements = values.elements(entry, start - entry.offset..end - entry.offset)?;
                shard.slice_set(&elements.to_dtype(dtype)?, 0, place + start - own.start)?;
            }
        }
        Ok(shard)
    }

    /// A shard of zeros.
    fn padding(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        // A GPU has no empty tensors.
        let device = if self.shard_len() == 0 { &Device::Cpu } else { device };
        Ok(Tensor::zeros(self.shard_len(), dtype, device)?)
    }

    /// What part `index` holds, without padding, in the order of [`Partition::owned`].
    pub fn strip(&self, shard: &Tensor, index: usize) -> Result<Vec<f32>> {
        // Without a copy of its own the whole of what it is a view of would come from a GPU.
        let values = shard.force_contiguous()?.to_vec1::<f32>()?;
        let mut out = Vec::with_capacity(values.len());
        for (range, place) in (0..self.stages()).map(|stage| self.own(stage, index)) {
            out.extend_from_slice(&values[place..place + range.len()]);
        }
        Ok(out)
    }

    /// The inverse of [`Partition::strip`]: `[S]`.
    pub fn fill(&self, owned: &[f32], index: usize, device: &Device) -> Result<Tensor> {
        let mut values = vec![0.0; self.shard_len()];
        let mut taken = 0;
        for (range, place) in (0..self.stages()).map(|stage| self.own(stage, index)) {
            values[place..place + range.len()].copy_from_slice(&owned[taken..taken + range.len()]);
            taken += range.len();
        }
        Ok(Tensor::from_vec(values, self.shard_len(), device)?)
    }
}

#[cfg(test)]
mod tests;
