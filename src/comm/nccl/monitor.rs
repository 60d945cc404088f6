//! Looks after the calls that the GPU works on, while the host does something else.

use super::handle::Handle;
use crate::comm::plane::Collective;
use crate::comm::watch::{self, Waiting};
use crate::error::{Error, Result};
use cudarc::driver::{CudaContext, CudaEvent};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often it looks.
const TICK: Duration = Duration::from_millis(2);

/// The thread, until it is stopped.
pub(super) struct Monitor {
    calls: Option<Sender<Flight>>,
    thread: Option<JoinHandle<()>>,
    /// Whether it ends although calls are under way.
    at_once: Arc<AtomicBool>,
}

/// A call under way. The deadline runs from when the GPU has come to it, not from when the host asked for it.
struct Flight {
    collective: Collective,
    ready: CudaEvent,
    done: Arc<CudaEvent>,
    waiting: Option<Waiting>,
}

impl Monitor {
    /// Starts the thread; `abort` ends all ranks.
    pub fn start(handle: Arc<Handle>, context: Arc<CudaContext>, abort: fn(i32) -> !) -> Result<Self> {
        let (calls, queue) = channel();
        let at_once = Arc::new(AtomicBool::new(false));
        let told = at_once.clone();
        let work = move || {
            let bound = context.bind_to_thread().map_err(|e| Error::Failed(format!("the GPU: {e:?}")));
            if let Err(e) = bound.and_then(|()| look(&handle, &queue, &told)) {
                // Nobody can say whether the collective will ever end.
                eprintln!("{}", watch::signed(&watch::at_last(&e.to_string())));
                abort(e.exit_code())
            }
        };
        let thread = std::thread::Builder::new().name("nccl".into()).spawn(work);
        let thread = thread.map_err(|e| Error::Failed(format!("the thread of NCCL could not be started: {e}")))?;
        Ok(Self { calls: Some(calls), thread: Some(thread), at_once })
    }

    /// Looks after a call that the GPU comes to at `ready` and ends at `done`.
    pub fn look_after(&self, collective: Collective, ready: CudaEvent, done: Arc<CudaEvent>) -> Result<()> {
        let gone = || Error::Failed("the thread of NCCL has ended".into());
        let flight = Flight { collective, ready, done, waiting: None };
        self.calls.as_ref().ok_or_else(gone)?.send(flight).map_err(|_| gone())
    }

    /// Ends the thread, at once or when no call is under way.
    pub fn stop(&mut self, at_once: bool) {
        self.at_once.store(at_once, Ordering::SeqCst);
        drop(self.calls.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Until the calls end: an error of NCCL's or of the GPU's.
fn look(handle: &Handle, queue: &Receiver<Flight>, at_once: &AtomicBool) -> Result<()> {
    let mut flights: VecDeque<Flight> = VecDeque::new();
    loop {
        let next = match flights.is_empty() {
            true => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => queue.recv_timeout(TICK),
        };
        match next {
            Ok(flight) => flights.push_back(flight),
            Err(RecvTimeoutError::Disconnected) if flights.is_empty() => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
            Err(RecvTimeoutError::Timeout) => (),
        }
        if at_once.load(Ordering::SeqCst) {
            return Ok(());
        }
        let Some(collective) = flights.front().map(|flight| flight.collective) else { continue };
        handle.check(collective)?;
        // They end in the order of their beginning.
        while let Some(flight) = flights.front_mut() {
            if flight.waiting.is_none() && passed(&flight.ready)? {
                flight.waiting = Some(watch::waiting(flight.collective));
            }
            if !passed(&flight.done)? {
                break;
            }
            flights.pop_front();
        }
    }
}

fn passed(event: &CudaEvent) -> Result<bool> {
    event.try_is_complete().map_err(|e| Error::Failed(format!("the GPU failed: {e:?}")))
}
