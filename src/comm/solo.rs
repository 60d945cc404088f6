//! One rank alone: every collective is the identity.

use super::{Call, Communicator};
use crate::error::{Result, failing};
use candle_core::Tensor;

/// The communicator of a run with one rank.
#[derive(Debug, Clone, Copy)]
pub struct Solo;

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn call(&self, call: Call, tensor: &Tensor) -> Result<Tensor> {
        call.check(tensor, 1)?;
        // A copy, because results share no memory with arguments: a variable that is set later must not change them. Not
        // by `copy`, which takes along all that the tensor is a view of.
        Ok(tensor.detach().force_contiguous()?)
    }
    fn abort(&self, code: i32) -> ! {
        std::process::exit(failing(code))
    }
}
