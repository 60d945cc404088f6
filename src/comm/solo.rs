//! One rank alone: every collective is the identity.

use super::transport::Call;
use super::{Communicator, ReduceOp};
use crate::error::Result;
use candle_core::Tensor;

/// The communicator of a run with one rank.
#[derive(Debug, Clone, Copy)]
pub struct Solo;

/// A copy, because results share no memory with arguments: a variable that is set later must not change them.
fn own(call: Call, tensor: &Tensor) -> Result<Tensor> {
    call.check(tensor, 1)?;
    Ok(tensor.detach().copy()?)
}

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn barrier(&self) -> Result<()> {
        Ok(())
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Tensor> {
        own(Call::Broadcast { root }, tensor)
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Tensor> {
        own(Call::AllReduce(op), tensor)
    }
    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        own(Call::AllGather, tensor)
    }
    fn reduce_scatter(&self, tensor: &Tensor, op: ReduceOp) -> Result<Tensor> {
        own(Call::ReduceScatter(op), tensor)
    }
    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}
