//! The sum of gradients over micro-batches, flat and in f32.

use crate::error::{Error, Result};
use crate::params::Layout;
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout as Strides, Tensor};

/// Gradients of the trainable parameters, summed in f32 in the flat vector's order.
pub struct Gradients {
    layout: Layout,
    sum: Tensor,
    seen: Vec<bool>,
}

impl Gradients {
    /// Zeros. `padded` is the length of the flat vector with its padding, `layout.total` or more.
    pub fn zeros(layout: &Layout, padded: usize, device: &Device) -> Result<Self> {
        let sum = Tensor::zeros(padded, DType::F32, device)?;
        Ok(Self { layout: layout.clone(), sum, seen: vec![false; layout.entries.len()] })
    }

    /// Adds gradients of one stage's parameters, by slot.
    pub fn add(&mut self, stage: usize, gradients: Vec<(usize, Tensor)>) -> Result<()> {
        for (slot, gradient) in gradients {
            let place = self.layout.entries.iter().position(|e| e.stage == stage && e.slot == slot);
            let place =
                place.ok_or_else(|| Error::Failed(format!("stage {stage} has no trainable parameter {slot}")))?;
            let gradient = gradient.to_dtype(DType::F32)?.contiguous()?;
            self.sum.inplace_op2(&gradient, &AddAt(self.layout.entries[place].offset))?;
            self.seen[place] = true;
        }
        Ok(())
    }

    /// The sum `[padded]`. `touched` says whether this rank ran any backward pass: if so, a trainable parameter that
    /// got no gradient is an error that names it (candle cuts graphs silently), if not, the zeros are right.
    pub fn finish(self, touched: bool) -> Result<Tensor> {
        if let (true, Some(missing)) = (touched, self.seen.iter().position(|s| !s)) {
            let name = &self.layout.entries[missing].name;
            return Err(Error::Failed(format!("trainable parameter {name} got no gradient: its graph is cut")));
        }
        Ok(self.sum)
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
}
