//! The sum of gradients over micro-batches, flat and in f32.

use super::Partition;
use crate::error::{Error, Result};
use crate::params::{Entry, Layout};
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout as Strides, Tensor};

/// Gradients of the trainable parameters, summed in f32 in the order of the padded vector ([`super`]).
pub struct Gradients {
    layout: Layout,
    /// Where each entry of the layout begins.
    places: Vec<usize>,
    sum: Tensor,
    seen: Vec<bool>,
    /// Whether a backward pass added to it.
    touched: bool,
}

impl Gradients {
    /// Zeros.
    pub fn zeros(layout: &Layout, partition: &Partition, device: &Device) -> Result<Self> {
        let place = |e: &Entry| partition.padded(e.stage).start + e.offset - partition.flat(e.stage).start;
        Ok(Self {
            layout: layout.clone(),
            places: layout.entries.iter().map(place).collect(),
            sum: Tensor::zeros(partition.padded_len(), DType::F32, device)?,
            seen: vec![false; layout.entries.len()],
            touched: false,
        })
    }

    /// Adds gradients of one stage's parameters, by slot.
    pub fn add(&mut self, stage: usize, gradients: Vec<(usize, Tensor)>) -> Result<()> {
        self.touched = true;
        for (slot, gradient) in gradients {
            let place = self.layout.entries.iter().position(|e| e.stage == stage && e.slot == slot);
            let place =
                place.ok_or_else(|| Error::Failed(format!("stage {stage} has no trainable parameter {slot}")))?;
            // The GPU's kernel adds either type.
            let gradient = if gradient.device().is_cpu() { gradient.to_dtype(DType::F32)? } else { gradient };
            let gradient = gradient.contiguous()?;
            self.sum.inplace_op2(&gradient, &AddAt(self.places[place]))?;
            self.seen[place] = true;
        }
        Ok(())
    }

    /// The sum so far, `[padded]`.
    pub fn sum(&self) -> &Tensor {
        &self.sum
    }

    /// If this rank ran any backward pass, a trainable parameter that got no gradient is an error that names it (candle
    /// cuts graphs silently); if not, the zeros are right.
    pub fn check(&self) -> Result<()> {
        if let (true, Some(missing)) = (self.touched, self.seen.iter().position(|s| !s)) {
            let name = &self.layout.entries[missing].name;
            return Err(Error::Failed(format!("trainable parameter {name} got no gradient: its graph is cut")));
        }
        Ok(())
    }
}

/// `destination[offset..] += source`.
struct AddAt(usize);

impl InplaceOp2 for AddAt {
    fn name(&self) -> &'static str {
        "add_at"
    }
    fn cpu_fwd(&self, dst: &mut CpuStorage, _: &Strides, src: &CpuStorage, l: &Strides) -> candle_core::Result<()> {
        let (CpuStorage::F32(dst), CpuStorage::F32(src), Some((start, end))) = (dst, src, l.contiguous_offsets())
        else {
            candle_core::bail!("add_at: f32 and contiguous only");
        };
        for (d, s) in dst[self.0..].iter_mut().zip(&src[start..end]) {
            *d += s;
        }
        Ok(())
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        dst: &mut candle_core::CudaStorage,
        dl: &Strides,
        src: &candle_core::CudaStorage,
        l: &Strides,
    ) -> candle_core::Result<()> {
        let mut place = crate::cuda::array(dst, dl)?;
        place.pointer += (self.0 * place.dtype.size_in_bytes()) as u64;
        place.shape = vec![place.len() - self.0];
        crate::cuda::elementwise::add_to(&src.device, &place, &crate::cuda::array(src, l)?)
    }
}
