//! NCCL's own calls, as far as we use them.

use crate::comm::plane::Collective;
use crate::comm::{Call, ReduceOp};
use crate::cuda::library::Library;
use crate::error::{Error, Result};
use candle_core::DType;
use cudarc::driver::CudaStream;
use cudarc::nccl::result::{self, NcclError, NcclStatus};
use cudarc::nccl::sys::{self, ncclDataType_t, ncclRedOp_t, ncclResult_t};
use std::ffi::{CStr, c_void};
use std::fmt::Display;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// A call is over within this, unless it has to meet other ranks: NCCL's thread takes some 50 us for it.
const SOON: Duration = Duration::from_millis(1);

/// The longest pause between two looks at a communicator that is not ready.
const LONGEST_PAUSE: Duration = Duration::from_millis(5);

/// The version of the header that [`sys::ncclConfig_t`] was made from.
const HEADER: u32 = 22809;
const MAGIC: u32 = 0xcafe_beef;

/// Memory on the GPU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffer {
    pub pointer: u64,
    pub dtype: DType,
}

/// A communicator of NCCL's that does not block, for one thread at a time.
///
/// NCCL does a call of such a communicator on a thread of its own, the group job. To ask for the communicator's state is
/// no mere look: from 2.26 on `ncclCommGetAsyncError` joins and frees a job that has ended, without a lock (init.cc;
/// `ncclGroupJobComplete` in group.cc); earlier versions do so in the next call (`ncclCommEnsureReady`). So the lock is
/// held from a call until its job has ended, and whoever else takes it finds no job.
pub(super) struct Handle(Mutex<Comm>);

/// The communicator; null once it has ended.
struct Comm(sys::ncclComm_t);

// SAFETY: NCCL binds a communicator to no thread, and wants only that its calls do not overlap: each needs the lock of
// [`Handle`].
unsafe impl Send for Comm {}

/// Opens the library.
pub(super) fn open() -> Result<()> {
    Library::Nccl.open().map_err(|e| {
        Error::Usage(format!(
            "several ranks with GPUs need NCCL, and {} is missing ({e}): load its module, or put its folder into \
             LD_LIBRARY_PATH",
            Library::Nccl.file()
        ))
    })
}

pub(super) fn version() -> String {
    match result::get_nccl_version() {
        Ok(version) => format!("NCCL {}.{}.{}", version / 10_000, version / 100 % 100, version % 100),
        Err(_) => "NCCL".into(),
    }
}

pub(super) fn new_id() -> Result<[u8; super::ID_BYTES]> {
    let id = result::get_uniqueid().map_err(|e| error(&"an id", &e, std::ptr::null_mut()))?;
    Ok(id.internal.map(|byte| byte as u8))
}

/// NCCL's word on an error.
fn error(what: &dyn Display, NcclError(code): &NcclError, comm: sys::ncclComm_t) -> Error {
    // SAFETY: a communicator, or none: the last error of this process; a string of the library's own.
    let last = unsafe {
        let text = sys::ncclGetLastError(comm);
        if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().trim().to_owned() }
    };
    let detail = if last.is_empty() { "NCCL_DEBUG=WARN says more".into() } else { last };
    let message = format!("NCCL, {what}: {} ({detail})", &format!("{code:?}")[4..]);
    match code {
        // The network or a peer: another try may do.
        ncclResult_t::ncclRemoteError | ncclResult_t::ncclSystemError => Error::Peer(message),
        _ => Error::Failed(message),
    }
}

impl Handle {
    /// A communicator of `world_size` ranks that all call this with the same id.
    pub fn connect(id: [u8; super::ID_BYTES], rank: usize, world_size: usize, deadline: Duration) -> Result<Self> {
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as std::ffi::c_char) };
        let unset = i32::MIN;
        let mut config = sys::ncclConfig_t {
            size: size_of::<sys::ncclConfig_t>(),
            magic: MAGIC,
            version: HEADER,
            blocking: 0,
            cgaClusterSize: unset,
            minCTAs: unset,
            maxCTAs: unset,
            netName: std::ptr::null(),
            splitShare: unset,
            trafficClass: unset,
            commName: std::ptr::null(),
            collnetEnable: unset,
            CTAPolicy: unset,
            shrinkShare: unset,
            nvlsCTAs: unset,
            nChannelsPerNetPeer: unset,
            nvlinkCentricSched: unset,
        };
        let mut comm = std::ptr::null_mut();
        // SAFETY: the configuration is filled as NCCL_CONFIG_INITIALIZER does; `comm` is written before the call returns.
        let status =
            unsafe { result::comm_init_rank_config(&mut comm, world_size as i32, id, rank as i32, &mut config) };
        let mut comm = Comm(comm);
        let late = Instant::now() + deadline;
        let ready = status.map_err(|e| error(&"init", &e, comm.0)).and_then(|_| comm.settle(&"init", Some(late)));
        ready.inspect_err(|_| comm.give_up())?;
        Ok(Self(Mutex::new(comm)))
    }

    fn lock(&self) -> MutexGuard<'_, Comm> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks whether anything went wrong in a collective that the GPU works on; not while another thread is in a call,
    /// which looks itself.
    pub fn check(&self, collective: Collective) -> Result<()> {
        match self.0.try_lock() {
            Ok(comm) => comm.is_ready(&collective).map(drop),
            Err(TryLockError::Poisoned(comm)) => comm.into_inner().is_ready(&collective).map(drop),
            Err(TryLockError::WouldBlock) => Ok(()),
        }
    }

    /// Gives a call on `len` elements of this rank to the stream, in place where `receive` is `send`.
    pub fn enqueue(
        &self,
        collective: Collective,
        call: Call,
        (send, receive): (Buffer, Buffer),
        (rank, ranks): (usize, usize),
        len: usize,
        stream: &CudaStream,
    ) -> Result<()> {
        let dtype = dtype(send.dtype)?;
        let part = |of: Buffer, len: usize| of.pointer + (rank * len * of.dtype.size_in_bytes()) as u64;
        let (from, to) = (send.pointer as *const c_void, receive.pointer as *mut c_void);
        let held = self.lock();
        let (comm, stream) = (held.0, stream.cu_stream().cast());
        // SAFETY: `send` and `receive` are memory of this GPU, of the length that the call wants, and live until the event
        // that the caller records behind it. The lock is held.
        let status = unsafe {
            match call {
                Call::AllGather => result::all_gather(part(send, len) as *const c_void, to, len, dtype, comm, stream),
                Call::Broadcast { root } => result::broadcast(from, to, len, dtype, root as i32, comm, stream),
                Call::AllReduce(op) => result::all_reduce(from, to, len, dtype, operation(op), comm, stream),
                Call::ReduceScatter(op) => {
                    result::reduce_scatter(from, to, len / ranks, dtype, operation(op), comm, stream)
                }
                Call::Barrier => return Err(Error::Failed("NCCL has no barrier".into())),
            }
        };
        status.map_err(|e| error(&collective, &e, comm))?;
        // The first call of a kind makes its connections; only then it is on the stream.
        held.settle(&collective, None)
    }

    /// The end that all ranks come to.
    pub fn finalize(&self) {
        self.lock().finalize();
    }

    /// The end of a rank whose peers may be gone.
    pub fn give_up(&self) {
        self.lock().give_up();
    }
}

impl Comm {
    /// Whether NCCL is through with what it was told, or what went wrong.
    fn is_ready(&self, what: &dyn Display) -> Result<bool> {
        if self.0.is_null() {
            return Err(Error::Failed(format!("NCCL, {what}: the communicator has ended")));
        }
        let mut code = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator has not ended, and the lock is held.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.0, &mut code) }.result();
        match asked.and_then(|_| code.result()) {
            Ok(NcclStatus::InProgress) => Ok(false),
            Ok(_) => Ok(true),
            Err(e) => Err(error(what, &e, self.0)),
        }
    }

    /// Returns when NCCL is through with what it was told; without a time of its own the watchdog's deadline holds.
    fn settle(&self, what: &dyn Display, late: Option<Instant>) -> Result<()> {
        let begun = Instant::now();
        while !self.is_ready(what)? {
            if late.is_some_and(|late| Instant::now() > late) {
                return Err(Error::Peer(format!("NCCL, {what}: not all ranks came within the deadline")));
            }
            pause(begun.elapsed());
        }
        Ok(())
    }

    fn finalize(&mut self) {
        // SAFETY: the communicator has not ended, and the lock is held.
        let ended = unsafe { result::comm_finalize(self.0) }.map_err(|e| error(&"finalize", &e, self.0));
        match ended.and_then(|_| self.settle(&"finalize", None)) {
            // SAFETY: as above; nothing finds the communicator afterwards.
            Ok(()) => drop(unsafe { result::comm_destroy(std::mem::replace(&mut self.0, std::ptr::null_mut())) }),
            Err(_) => self.give_up(),
        }
    }

    fn give_up(&mut self) {
        let comm = std::mem::replace(&mut self.0, std::ptr::null_mut());
        if !comm.is_null() {
            // SAFETY: the lock is held; nothing finds the communicator afterwards.
            let _ = unsafe { result::comm_abort(comm) };
        }
    }
}

/// Between two looks at a communicator: a turn for other threads, as NCCL's may wait for this core; a sleep when it takes
/// longer, as where ranks have to meet.
fn pause(waited: Duration) {
    match waited < SOON {
        true => std::thread::yield_now(),
        false => std::thread::sleep((waited / 8).min(LONGEST_PAUSE)),
    }
}

fn operation(op: ReduceOp) -> ncclRedOp_t {
    match op {
        ReduceOp::Sum => ncclRedOp_t::ncclSum,
        ReduceOp::Max => ncclRedOp_t::ncclMax,
    }
}

fn dtype(dtype: DType) -> Result<ncclDataType_t> {
    Ok(match dtype {
        DType::F32 => ncclDataType_t::ncclFloat32,
        DType::BF16 => ncclDataType_t::ncclBfloat16,
        DType::F64 => ncclDataType_t::ncclFloat64,
        DType::U32 => ncclDataType_t::ncclUint32,
        DType::U8 => ncclDataType_t::ncclUint8,
        other => return Err(Error::Failed(format!("NCCL: no way to send {}", other.as_str()))),
    })
}
