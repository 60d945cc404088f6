//! Collectives on a thread of their own, so that the caller computes while ranks wait for each other and data moves.

use super::{Call, Communicator, Pending};
use crate::error::{Error, Result};
use candle_core::Tensor;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

type Job = (Call, Tensor, Sender<Result<Tensor>>);

/// A communicator whose collectives run on one thread, in the order of their beginning.
pub(super) struct Background {
    rank: usize,
    world_size: usize,
    abort: fn(i32) -> !,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// `inner` moves to the thread; `abort` ends all ranks from any thread.
    pub fn new(inner: Box<dyn Communicator + Send>, abort: fn(i32) -> !) -> Result<Self> {
        let (rank, world_size) = (inner.rank(), inner.world_size());
        let (jobs, queue) = channel::<Job>();
        let work = move || {
            for (call, tensor, result) in queue {
                // The caller may have gone on without the result, after an error of its own.
                let _ = result.send(inner.call(call, &tensor));
            }
        };
        let thread = std::thread::Builder::new().name("collectives".into()).spawn(work);
        let thread =
            thread.map_err(|e| Error::Failed(format!("the thread of the collectives could not be started: {e}")))?;
        Ok(Self { rank, world_size, abort, jobs: Some(jobs), thread: Some(thread) })
    }
}

impl Communicator for Background {
    fn rank(&self) -> usize {
        self.rank
    }
    fn world_size(&self) -> usize {
        self.world_size
    }
    fn begin(&self, call: Call, tensor: &Tensor) -> Result<Pending> {
        call.check(tensor, self.world_size)?;
        let (sender, receiver) = channel();
        // A copy: the caller may change its tensor in place before the thread has read it.
        let job = (call, tensor.detach().force_contiguous()?, sender);
        let gone = || Error::Failed("the thread of the collectives has ended".into());
        self.jobs.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
        Ok(Pending::awaited(receiver))
    }
    fn call(&self, call: Call, tensor: &Tensor) -> Result<Tensor> {
        self.begin(call, tensor)?.wait()
    }
    fn abort(&self, code: i32) -> ! {
        (self.abort)(code)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // What was begun is ended first: the peers wait for it.
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
