//! Ranks as threads of one process: for tests.

use super::Call;
use super::background::Background;
use super::transport::{Element, Transport};
use super::world::World;
use crate::error::{Error, Result};
use std::any::Any;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A rank that waits longer for its peers gives up.
const DEADLINE: Duration = Duration::from_secs(300);

/// R communicators joined in memory.
pub struct ThreadGroup;

impl ThreadGroup {
    /// Runs `body` on `ranks` threads, each with its own world, and returns their values in rank order.
    ///
    /// Where a rank fails, ends or panics, the collectives of the others end in [`Error::Peer`]; a panic goes on in the
    /// caller, and of several errors the one that is no consequence of another is returned.
    pub fn run<T: Send>(ranks: usize, body: impl Fn(World) -> Result<T> + Sync) -> Result<Vec<T>> {
        let planes = [Arc::new(Shared::new(ranks)), Arc::new(Shared::new(ranks))];
        let outcomes = std::thread::scope(|scope| {
            let start = |rank| {
                let ([device, host], body) = (planes.clone().map(|shared| Thread { rank, shared }), &body);
                scope.spawn(move || {
                    let _leaving = [Leaving(device.clone()), Leaving(host.clone())];
                    let device = Background::new(Box::new(device), give_up)?;
                    body(World::of_threads(Rc::new(device), Rc::new(host)))
                })
            };
            let handles = (0..ranks).map(start).collect::<Vec<_>>();
            handles.into_iter().map(|handle| handle.join()).collect::<Vec<_>>()
        });
        let mut values = Vec::with_capacity(ranks);
        let mut consequence = None;
        for outcome in outcomes {
            match outcome {
                Ok(Ok(value)) => values.push(value),
                Ok(Err(e @ Error::Peer(_))) => consequence = consequence.or(Some(e)),
                Ok(Err(e)) => return Err(e),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        consequence.map_or(Ok(values), Err)
    }
}

/// Ends the thread of the caller, as [`Transport::abort`] of a thread does.
fn give_up(code: i32) -> ! {
    panic!("a rank aborts with code {code}")
}

/// One rank's end of the group.
#[derive(Clone)]
struct Thread {
    rank: usize,
    shared: Arc<Shared>,
}

/// One round at a time: every rank puts its slice in, all take all slices out, the last one clears the table.
struct Shared {
    table: Mutex<Table>,
    changed: Condvar,
}

struct Table {
    slots: Vec<Option<Slot>>,
    taken: usize,
    gone: Vec<bool>,
}

#[derive(Clone)]
struct Slot {
    call: Call,
    slice: Arc<dyn Any + Send + Sync>,
}

impl Shared {
    fn new(ranks: usize) -> Self {
        let table = Table { slots: vec![None; ranks], taken: 0, gone: vec![false; ranks] };
        Self { table: Mutex::new(table), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready`, or until it can never come.
    fn wait<'a>(
        &self,
        mut table: MutexGuard<'a, Table>,
        call: Call,
        ready: impl Fn(&Table) -> bool,
    ) -> Result<MutexGuard<'a, Table>> {
        while !ready(&table) {
            let missing = (0..table.slots.len()).find(|&r| table.gone[r] && table.slots[r].is_none());
            if let Some(rank) = missing {
                return Err(Error::Peer(format!("{}: rank {rank} has ended", call.name())));
            }
            let (next, timeout) = self.changed.wait_timeout(table, DEADLINE).unwrap_or_else(PoisonError::into_inner);
            table = next;
            if timeout.timed_out() {
                let seconds = DEADLINE.as_secs();
                return Err(Error::Peer(format!("{}: a rank did not come within {seconds} s", call.name())));
            }
        }
        Ok(table)
    }

    /// Every rank's slice, in rank order.
    fn swap<T: Element>(&self, rank: usize, call: Call, send: &[T]) -> Result<Vec<Slot>> {
        let slot = Slot { call, slice: Arc::new(send.to_vec()) };
        let mut table = self.wait(self.lock(), call, |table| table.slots[rank].is_none())?;
        table.slots[rank] = Some(slot);
        self.changed.notify_all();
        let mut table = self.wait(table, call, |table| table.slots.iter().all(Option::is_some))?;
        let all = table.slots.iter().flatten().cloned().collect();
        table.taken += 1;
        if table.taken == table.slots.len() {
            table.slots.fill(None);
            table.taken = 0;
            self.changed.notify_all();
        }
        Ok(all)
    }
}

impl Transport for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.shared.lock().slots.len()
    }

    fn collective<T: Element>(&self, call: Call, send: &[T]) -> Result<Vec<T>> {
        let slots = self.shared.swap(self.rank, call, send)?;
        let slices = slots
            .iter()
            .enumerate()
            .map(|(rank, slot)| match slot.slice.downcast_ref::<Vec<T>>() {
                Some(slice) if slot.call == call && slice.len() == send.len() => Ok(slice.as_slice()),
                _ => Err(Error::Failed(format!(
                    "ranks are out of step: rank {} calls {call:?} on {} values, rank {rank} calls {:?}, or with \
                     another length or type",
                    self.rank,
                    send.len(),
                    slot.call
                ))),
            })
            .collect::<Result<Vec<_>>>()?;
        // Joined in the order of ranks, so that every rank gets the same bits.
        let reduced = |range: std::ops::Range<usize>, op| {
            let (first, others) = slices.split_first().unwrap_or((&send, &[]));
            let mut sum = first[range.clone()].to_vec();
            for other in others {
                sum.iter_mut().zip(&other[range.clone()]).for_each(|(sum, &v)| *sum = sum.join(v, op));
            }
            sum
        };
        Ok(match call {
            Call::Barrier => Vec::new(),
            Call::Broadcast { root } => slices[root].to_vec(),
            Call::AllGather => slices.concat(),
            Call::AllReduce(op) => reduced(0..send.len(), op),
            Call::ReduceScatter(op) => {
                let length = send.len() / slices.len();
                reduced(self.rank * length..(self.rank + 1) * length, op)
            }
        })
    }

    /// Ends this rank by a panic; its peers follow by [`Error::Peer`].
    fn abort(&self, code: i32) -> ! {
        panic!("rank {} aborts with code {code}", self.rank)
    }
}

/// Tells the others that this rank is gone, whatever way it went.
struct Leaving(Thread);

impl Drop for Leaving {
    fn drop(&mut self) {
        let Thread { rank, shared } = &self.0;
        shared.lock().gone[*rank] = true;
        shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::ReduceOp;
    use candle_core::{Device, Tensor};

    #[test]
    fn a_failing_rank_ends_the_others() {
        let outcome = ThreadGroup::run(3, |world| {
            world.host.barrier()?;
            if world.rank() == 1 {
                return Err(Error::Failed("rank 1 is ill".into()));
            }
            world.host.barrier()
        });
        assert!(matches!(outcome, Err(Error::Failed(message)) if message == "rank 1 is ill"));
    }

    #[test]
    fn a_rank_that_ends_early_ends_the_others() {
        let outcome = ThreadGroup::run(2, |world| if world.rank() == 0 { Ok(()) } else { world.host.barrier() });
        assert!(matches!(outcome, Err(Error::Peer(message)) if message == "barrier: rank 0 has ended"));
    }

    #[test]
    #[should_panic(expected = "rank 2 aborts with code 3")]
    fn a_panic_reaches_the_caller() {
        let _ = ThreadGroup::run(3, |world| match world.rank() {
            2 => world.host.abort(3),
            _ => world.host.barrier(),
        });
    }

    #[test]
    fn ranks_out_of_step_are_told() {
        let outcome = ThreadGroup::run(2, |world| {
            let tensor = Tensor::zeros(4 + world.rank(), candle_core::DType::F32, &Device::Cpu)?;
            world.host.all_reduce(&tensor, ReduceOp::Sum).map(|_| ())
        });
        assert!(matches!(outcome, Err(Error::Failed(message)) if message.starts_with("ranks are out of step")));
    }
}
