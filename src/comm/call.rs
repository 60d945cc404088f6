//! One collective call, and its result that is still to come.

use super::ReduceOp;
use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use std::sync::mpsc::Receiver;

/// One collective call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// [`super::Communicator::barrier`].
    Barrier,
    /// [`super::Communicator::broadcast`].
    Broadcast {
        /// The rank whose tensor it is.
        root: usize,
    },
    /// [`super::Communicator::all_reduce`].
    AllReduce(ReduceOp),
    /// [`super::Communicator::all_gather`].
    AllGather,
    /// [`super::Communicator::reduce_scatter`].
    ReduceScatter(ReduceOp),
}

impl Call {
    /// The name in messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Call::Barrier => "barrier",
            Call::Broadcast { .. } => "broadcast",
            Call::AllReduce(_) => "all_reduce",
            Call::AllGather => "all_gather",
            Call::ReduceScatter(_) => "reduce_scatter",
        }
    }

    /// How values are joined, where they are.
    pub(super) fn op(self) -> Option<ReduceOp> {
        match self {
            Call::AllReduce(op) | Call::ReduceScatter(op) => Some(op),
            Call::Barrier | Call::Broadcast { .. } | Call::AllGather => None,
        }
    }

    /// Refuses what would end differently on different transports: a bug of the caller.
    pub(super) fn check(self, tensor: &Tensor, world_size: usize) -> Result<()> {
        let failed = |what: String| Err(Error::Failed(format!("{}: {what}", self.name())));
        if tensor.dims().len() != 1 {
            return failed(format!("the tensor must have one dimension, not {:?}", tensor.dims()));
        }
        if !matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F64 | DType::U32 | DType::U8) {
            return failed(format!("the tensor must be of f32, bf16, f64, u32 or u8, not {}", tensor.dtype().as_str()));
        }
        match self {
            Call::Broadcast { root } if root >= world_size => {
                failed(format!("root is rank {root}, but there are {world_size} ranks"))
            }
            Call::ReduceScatter(_) if !tensor.elem_count().is_multiple_of(world_size) => {
                failed(format!("length {} is not a multiple of {world_size} ranks", tensor.elem_count()))
            }
            _ => Ok(()),
        }
    }
}

/// The result of a collective that was begun.
pub struct Pending(State);

enum State {
    Ready(Tensor),
    Awaited(Receiver<Result<Tensor>>),
    #[cfg(feature = "cuda")]
    Deferred(Box<dyn FnOnce() -> Result<Tensor>>),
}

impl Pending {
    /// A result that is there.
    pub(super) fn ready(tensor: Tensor) -> Self {
        Self(State::Ready(tensor))
    }

    /// A result that another thread sends.
    pub(super) fn awaited(receiver: Receiver<Result<Tensor>>) -> Self {
        Self(State::Awaited(receiver))
    }

    /// A result that the GPU is working on; `finish` orders it before what uses it.
    #[cfg(feature = "cuda")]
    pub(super) fn deferred(finish: impl FnOnce() -> Result<Tensor> + 'static) -> Self {
        Self(State::Deferred(Box::new(finish)))
    }

    /// Waits for the result.
    pub fn wait(self) -> Result<Tensor> {
        match self.0 {
            State::Ready(tensor) => Ok(tensor),
            #[cfg(feature = "cuda")]
            State::Deferred(finish) => finish(),
            State::Awaited(receiver) => {
                let gone = |_| Error::Failed("the thread of the collectives has ended".into());
                receiver.recv().map_err(gone)?
            }
        }
    }
}
