//! What a rank sends, in bytes and in calls.

use super::{Call, Communicator, Pending};
use crate::error::Result;
use candle_core::Tensor;
use std::cell::Cell;
use std::rc::Rc;

/// What a rank has sent so far.
#[derive(Debug, Default)]
pub(super) struct Sent {
    pub bytes: Cell<u64>,
    /// Collectives, barriers left out.
    pub calls: Cell<u64>,
}

/// A communicator that counts the calls and the bytes this rank sends in its collectives, by the ring algorithms, which are the least
/// possible: `(R - 1) S` elements for an all-gather or a reduce-scatter of shards of S, twice that, with
/// `S = ceil(N / R)`, for an all-reduce of N, and N for a broadcast. Transports may send more.
pub(super) struct Counted {
    inner: Rc<dyn Communicator>,
    sent: Rc<Sent>,
}

impl Counted {
    pub fn new(inner: Rc<dyn Communicator>, sent: Rc<Sent>) -> Self {
        Self { inner, sent }
    }

    fn count(&self, call: Call, tensor: &Tensor) {
        let (peers, elements) = (self.world_size() - 1, tensor.elem_count());
        let sent = match call {
            Call::Barrier => 0,
            Call::Broadcast { .. } => elements * peers.min(1),
            Call::AllReduce(_) => 2 * peers * elements.div_ceil(peers + 1),
            Call::AllGather => peers * elements,
            Call::ReduceScatter(_) => peers * (elements / (peers + 1)),
        };
        self.sent.bytes.set(self.sent.bytes.get() + (sent * tensor.dtype().size_in_bytes()) as u64);
        self.sent.calls.set(self.sent.calls.get() + u64::from(call != Call::Barrier && peers > 0));
    }
}

impl Communicator for Counted {
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn world_size(&self) -> usize {
        self.inner.world_size()
    }
    fn call(&self, call: Call, tensor: &Tensor) -> Result<Tensor> {
        self.count(call, tensor);
        self.inner.call(call, tensor)
    }
    fn begin(&self, call: Call, tensor: &Tensor) -> Result<Pending> {
        self.count(call, tensor);
        self.inner.begin(call, tensor)
    }
    fn abort(&self, code: i32) -> ! {
        self.inner.abort(code)
    }
}

#[cfg(test)]
mod tests {
    use crate::comm::{ReduceOp, ThreadGroup};
    use candle_core::{DType, Device, Tensor};

    #[test]
    fn bytes_are_those_of_the_ring_algorithms() {
        let sent = ThreadGroup::run(4, |world| {
            let mut all = vec![world.sent()];
            let (six, eight) =
                (Tensor::zeros(6, DType::F32, &Device::Cpu)?, Tensor::zeros(8, DType::BF16, &Device::Cpu)?);
            world.device.all_gather(&six)?;
            all.push(world.sent());
            world.device.reduce_scatter(&eight, ReduceOp::Sum)?;
            all.push(world.sent());
            world.device.all_reduce(&six, ReduceOp::Sum)?;
            all.push(world.sent());
            world.host.all_gather(&six)?;
            world.device.barrier()?;
            all.push(world.sent());
            assert_eq!(world.calls(), 3);
            Ok(all)
        });
        let expected = [0, 3 * 6 * 4, 72 + 3 * 2 * 2, 84 + 2 * 3 * 2 * 4, 132];
        sent.expect("four ranks").into_iter().for_each(|sent| assert_eq!(sent, expected));
    }
}
