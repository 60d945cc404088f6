//! What the transports through host memory share: tensors become slices, and the results tensors again.

use super::{Call, Communicator, ReduceOp};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Storage, Tensor, WithDType};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;

/// What a transport needs to know of a type: the MPI library must know it too, where there is one.
#[cfg(feature = "mpi")]
pub(super) trait Wire: ::mpi::traits::Equivalence {}
#[cfg(feature = "mpi")]
impl<T: ::mpi::traits::Equivalence> Wire for T {}
#[cfg(not(feature = "mpi"))]
pub(super) trait Wire {}
#[cfg(not(feature = "mpi"))]
impl<T> Wire for T {}

/// A number that goes over the wire.
pub(super) trait Element: Wire + bytemuck::Pod + Default + Send + Sync {
    /// The sum or the larger of two.
    fn join(self, other: Self, op: ReduceOp) -> Self;
}

macro_rules! element {
    ($($t:ty: $add:expr),*) => {$(
        impl Element for $t {
            fn join(self, other: Self, op: ReduceOp) -> Self {
                match op {
                    ReduceOp::Sum => $add(self, other),
                    ReduceOp::Max => self.max(other),
                }
            }
        }
    )*};
}
// u64 are ordered keys of f64 (see `run`), u16 the bits of bf16: moved, never added.
element!(f32: std::ops::Add::add, f64: std::ops::Add::add, u8: u8::wrapping_add, u16: u16::wrapping_add,
         u32: u32::wrapping_add, u64: u64::wrapping_add);

/// Collectives on slices: all that a transport through host memory has to give.
pub(super) trait Transport {
    /// This rank.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn world_size(&self) -> usize;
    /// The collective's result; `send` has the same length on every rank.
    fn collective<T: Element>(&self, call: Call, send: &[T]) -> Result<Vec<T>>;
    /// Ends all ranks.
    fn abort(&self, code: i32) -> !;
}

impl<C: Transport> Communicator for C {
    fn rank(&self) -> usize {
        Transport::rank(self)
    }
    fn world_size(&self) -> usize {
        Transport::world_size(self)
    }
    fn call(&self, call: Call, tensor: &Tensor) -> Result<Tensor> {
        run(self, call, tensor)
    }
    fn abort(&self, code: i32) -> ! {
        Transport::abort(self, code)
    }
}

/// The call on a tensor of any device: through host memory and back.
fn run<C: Transport>(comm: &C, call: Call, tensor: &Tensor) -> Result<Tensor> {
    call.check(tensor, comm.world_size())?;
    let host = tensor.detach().to_device(&Device::Cpu)?.contiguous()?;
    let result = match (host.dtype(), call.op()) {
        // Reduced in f32 and rounded once.
        (DType::BF16, Some(_)) => run(comm, call, &host.to_dtype(DType::F32)?)?.to_dtype(DType::BF16)?,
        (DType::BF16, None) => on_slice(&host, |values: &[bf16]| {
            Ok(comm.collective(call, values.reinterpret_cast())?.reinterpret_into::<bf16>())
        })?,
        // MPI's maximum of a NaN and a number depends on their order, so ranks could disagree on a step that only some
        // of them see fail: integer keys have one order, with NaN on top.
        (DType::F32, Some(ReduceOp::Max)) => on_slice(&host, |values: &[f32]| {
            let keys = values.iter().map(|&v| key32(v)).collect::<Vec<_>>();
            Ok(comm.collective(call, &keys)?.into_iter().map(value32).collect())
        })?,
        (DType::F64, Some(ReduceOp::Max)) => on_slice(&host, |values: &[f64]| {
            let keys = values.iter().map(|&v| key64(v)).collect::<Vec<_>>();
            Ok(comm.collective(call, &keys)?.into_iter().map(value64).collect())
        })?,
        (DType::F32, _) => on_slice(&host, |values: &[f32]| comm.collective(call, values))?,
        (DType::F64, _) => on_slice(&host, |values: &[f64]| comm.collective(call, values))?,
        (DType::U32, _) => on_slice(&host, |values: &[u32]| comm.collective(call, values))?,
        (DType::U8, _) => on_slice(&host, |values: &[u8]| comm.collective(call, values))?,
        (other, _) => return Err(Error::Failed(format!("{}: no way to send {}", call.name(), other.as_str()))),
    };
    Ok(result.to_device(tensor.device())?)
}

/// `f` on the memory of a contiguous tensor of the CPU, without a copy; the result has one dimension.
fn on_slice<T: WithDType>(tensor: &Tensor, f: impl FnOnce(&[T]) -> Result<Vec<T>>) -> Result<Tensor> {
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cpu(cpu), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        return Err(Error::Failed("a tensor for a collective is not contiguous in host memory".into()));
    };
    let result = f(&cpu.as_slice::<T>()?[start..end])?;
    let length = result.len();
    Ok(Tensor::from_vec(result, length, &Device::Cpu)?)
}

/// A key that orders as the number does, NaN above infinity.
fn key32(value: f32) -> u32 {
    let bits = value.to_bits();
    match (value.is_nan(), value.is_sign_negative()) {
        (true, _) => u32::MAX,
        (_, true) => !bits,
        (_, false) => bits | 1 << 31,
    }
}

/// The number of a key.
fn value32(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key ^ 1 << 31 } else { !key })
}

/// A key that orders as the number does, NaN above infinity.
fn key64(value: f64) -> u64 {
    let bits = value.to_bits();
    match (value.is_nan(), value.is_sign_negative()) {
        (true, _) => u64::MAX,
        (_, true) => !bits,
        (_, false) => bits | 1 << 63,
    }
}

/// The number of a key.
fn value64(key: u64) -> f64 {
    f64::from_bits(if key >> 63 == 1 { key ^ 1 << 63 } else { !key })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_as_numbers_do_and_come_back() {
        let values = [f32::NEG_INFINITY, -2.5, -1e-40, -0.0, 0.0, 1e-40, 1.0, f32::MAX, f32::INFINITY];
        assert!(values.windows(2).all(|w| key32(w[0]) < key32(w[1]) && key64(w[0].into()) < key64(w[1].into())));
        assert!(values.iter().all(|&v| value32(key32(v)).to_bits() == v.to_bits()));
        assert!(values.iter().all(|&v| value64(key64(v.into())) == f64::from(v)));
        assert!(value32(key32(-f32::NAN)).is_nan() && value64(key64(f64::NAN)).is_nan());
        assert!(key32(f32::NAN) > key32(f32::INFINITY));
    }
}
