//! Ranks joined by NCCL, one GPU each: gradients and parameters go from GPU to GPU.
//!
//! Collectives run on a stream of their own beside candle's. A call waits, on the GPU, for what candle was given before it;
//! the result is waited for, on the GPU again, when it is asked for: the host waits in neither case. Memory is freed in the
//! order of candle's stream, after that wait.
//!
//! Nothing waits for ever: the communicator is made without blocking, within the deadline; a thread looks after the calls
//! under way ([`monitor`]) and ends the job at an error of NCCL's, the watchdog at the deadline.

mod handle;
mod monitor;

use super::plane::{self, Collective, Plane};
use super::{Call, Communicator, Pending, ReduceOp, watch};
use crate::cuda::Gpu;
use crate::error::{Error, Result};
use candle_core::{DType, Device, Storage, Tensor};
use cudarc::driver::{CudaEvent, CudaStream, DriverError, result};
use handle::{Buffer, Handle};
use monitor::Monitor;
use std::sync::Arc;
use std::time::Duration;

/// The name by which ranks find each other.
pub const ID_BYTES: usize = 128;

/// A communicator of one rank.
pub struct Nccl {
    rank: usize,
    world_size: usize,
    device: Device,
    /// candle's stream.
    compute: Arc<CudaStream>,
    /// NCCL's.
    stream: Arc<CudaStream>,
    handle: Arc<Handle>,
    monitor: Monitor,
    plane: Plane,
    abort: fn(i32) -> !,
}

/// How a rank joins the others.
#[derive(Debug, Clone, Copy)]
pub struct Membership {
    /// The id that one rank made ([`Nccl::new_id`]) and all were told.
    pub id: [u8; ID_BYTES],
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// The longest that a collective, and the joining itself, may wait for a peer.
    pub deadline: Duration,
    /// Ends all ranks, from any thread.
    pub abort: fn(i32) -> !,
}

fn failed(what: &str) -> impl Fn(DriverError) -> Error {
    move |e| Error::Failed(format!("{what}: {e:?}"))
}

impl Nccl {
    /// An id for a new group of ranks: made by one of them and told to all.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no NCCL.
    pub fn new_id() -> Result<[u8; ID_BYTES]> {
        handle::open()?;
        handle::new_id()
    }

    /// Joins the other ranks: collective.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no NCCL or `device` is no GPU; [`Error::Peer`] if not all ranks come in time.
    pub fn join(device: &Device, membership: &Membership) -> Result<Self> {
        let &Membership { id, rank, world_size, deadline, abort } = membership;
        handle::open()?;
        let gpu =
            device.as_cuda_device().map_err(|_| Error::Usage("NCCL joins GPUs, and this rank has none".into()))?;
        let compute = gpu.cuda_stream();
        let context = compute.context();
        watch::arm_once(rank, deadline, abort)?;
        context.bind_to_thread().map_err(failed("the GPU"))?;
        let handle = Arc::new(Handle::connect(id, rank, world_size, deadline)?);
        let stream = context.new_stream().map_err(failed("a stream for NCCL"))?;
        let monitor = Monitor::start(handle.clone(), context.clone(), abort)?;
        let (device, plane) = (device.clone(), Plane::new(plane::DEVICE));
        Ok(Self { rank, world_size, device, compute, stream, handle, monitor, plane, abort })
    }

    /// Name and version of the library: "NCCL 2.28.9".
    pub fn library() -> String {
        handle::version()
    }

    /// Begins a call on a tensor of this GPU, of a type and an operation that NCCL has.
    fn begin_on_gpu(&self, call: Call, tensor: &Tensor) -> Result<InFlight> {
        let ranks = self.world_size;
        let (dtype, len) = (tensor.dtype(), tensor.elem_count());
        let (before, part, after) = match call {
            Call::AllGather => (ranks * len, self.rank * len, ranks * len),
            Call::ReduceScatter(_) => (len, 0, len / ranks),
            Call::Broadcast { .. } | Call::AllReduce(_) | Call::Barrier => (len, 0, len),
        };
        let buffer = self.buffer(dtype, before)?;
        self.copy_in(tensor, &buffer, part)?;
        let scattered = matches!(call, Call::ReduceScatter(_)).then(|| self.buffer(dtype, after)).transpose()?;
        let out = scattered.as_ref().unwrap_or(&buffer);
        let (send, receive) = (Buffer::of(&buffer)?, Buffer::of(out)?);

        let ready = self.compute.record_event(None).map_err(failed("an event"))?;
        self.stream.wait(&ready).map_err(failed("NCCL's stream"))?;
        let collective = self.plane.next(call);
        let begun = watch::waiting(collective);
        let enqueued = self.handle.enqueue(collective, call, (send, receive), (self.rank, ranks), len, &self.stream);
        if let Err(e) = enqueued {
            // NCCL may be at work on this memory: it is never given back. The job ends with the error.
            std::mem::forget((buffer, scattered));
            return Err(e);
        }
        drop(begun);
        let done = Arc::new(self.stream.record_event(None).map_err(failed("an event"))?);
        self.monitor.look_after(collective, ready, done.clone())?;
        let (result, source) = match scattered {
            Some(result) => (result, Some(buffer)),
            None => (buffer, None),
        };
        Ok(InFlight { result: Some(result), source, done, compute: self.compute.clone() })
    }

    /// Memory for a result, `[len]`.
    fn buffer(&self, dtype: DType, len: usize) -> Result<Tensor> {
        let gpu = self.device.as_cuda_device()?;
        Ok(crate::cuda::tensor(gpu.allocate(dtype, len)?, len))
    }

    /// Copies a tensor to `part` of a buffer, in the order of candle's stream: the caller may change it afterwards.
    fn copy_in(&self, tensor: &Tensor, buffer: &Tensor, part: usize) -> Result<()> {
        let tensor = tensor.contiguous()?;
        let (from, to) = (Buffer::of(&tensor)?, Buffer::of(buffer)?);
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        let to = to.pointer + (part * tensor.dtype().size_in_bytes()) as u64;
        // SAFETY: both lie on this GPU, the buffer was made for all parts, and the stream is that of both.
        unsafe { result::memcpy_dtod_async(to, from.pointer, bytes, self.compute.cu_stream()) }
            .map_err(failed("a copy"))
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn call(&self, call: Call, tensor: &Tensor) -> Result<Tensor> {
        self.begin(call, tensor)?.wait()
    }

    fn begin(&self, call: Call, tensor: &Tensor) -> Result<Pending> {
        call.check(tensor, self.world_size)?;
        let (tensor, device, dtype) = (tensor.detach(), tensor.device().clone(), tensor.dtype());
        let back = move |result: Tensor| Ok(result.to_device(&device)?);
        if call == Call::Barrier {
            let one = Tensor::zeros(1, DType::U8, &self.device)?;
            let under_way = self.begin_on_gpu(Call::AllReduce(ReduceOp::Sum), &one)?;
            return Ok(Pending::deferred(move || under_way.synchronize().map(|()| tensor)));
        }
        if tensor.elem_count() == 0 {
            return Ok(Pending::ready(tensor)); // nothing to say, on every rank alike
        }
        let on_gpu = match tensor.device() {
            Device::Cuda(_) => tensor.clone(),
            _ => tensor.to_device(&self.device)?,
        };
        match (dtype, call.op()) {
            (DType::BF16, Some(_)) => {
                let pending = self.begin(call, &on_gpu.to_dtype(DType::F32)?)?; // reduced in f32 and rounded once
                Ok(Pending::deferred(move || back(pending.wait()?.to_dtype(DType::BF16)?)))
            }
            // NCCL's maximum of a NaN and a number is the number.
            (DType::F32 | DType::F64, Some(ReduceOp::Max)) => Ok(Pending::ready(back(self.largest(call, &on_gpu)?)?)),
            _ => {
                let under_way = self.begin_on_gpu(call, &on_gpu)?;
                Ok(Pending::deferred(move || back(under_way.finish()?)))
            }
        }
    }

    fn abort(&self, code: i32) -> ! {
        (self.abort)(code)
    }
}

impl Nccl {
    /// The maximum over ranks, NaN above all, of few numbers: all of them are gathered, and compared on the host.
    fn largest(&self, call: Call, tensor: &Tensor) -> Result<Tensor> {
        let len = tensor.elem_count();
        let all = self.begin_on_gpu(Call::AllGather, tensor)?.finish()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let larger = |a: f64, b: f64| if a.is_nan() || a > b { a } else { b };
        let joined: Vec<f64> =
            (0..len).map(|i| all[i..].iter().step_by(len).copied().reduce(larger).unwrap_or(f64::NAN)).collect();
        let mine = match call {
            Call::ReduceScatter(_) => {
                let part = len / self.world_size;
                joined[self.rank * part..(self.rank + 1) * part].to_vec()
            }
            _ => joined,
        };
        let length = mine.len();
        Ok(Tensor::from_vec(mine, length, &self.device)?.to_dtype(tensor.dtype())?)
    }
}

/// A call under way, with the memory that it reads and writes.
struct InFlight {
    result: Option<Tensor>,
    source: Option<Tensor>,
    done: Arc<CudaEvent>,
    compute: Arc<CudaStream>,
}

impl InFlight {
    /// The result, in the order of candle's stream.
    fn finish(mut self) -> Result<Tensor> {
        self.compute.wait(&self.done).map_err(failed("candle's stream"))?;
        self.source = None;
        self.result.take().ok_or_else(|| Error::Failed("a collective's result was taken twice".into()))
    }

    /// Waits on the host.
    fn synchronize(self) -> Result<()> {
        self.done.synchronize().map_err(failed("a collective"))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.result.is_some() || self.source.is_some() {
            // Nobody wants the result; its memory is given back when NCCL is done with it.
            let _ = self.compute.wait(&self.done);
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // The end waits for all peers, like any collective.
        let _ending = watch::waiting(Collective::unnumbered("end of NCCL"));
        if std::thread::panicking() || self.stream.synchronize().is_err() {
            self.monitor.stop(true);
            return self.handle.give_up();
        }
        self.monitor.stop(false);
        self.handle.finalize();
    }
}

impl Buffer {
    /// A contiguous tensor's memory.
    fn of(tensor: &Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(Error::Failed("a tensor for NCCL is not on a GPU".into()));
        };
        let array = crate::cuda::array(storage, layout)?;
        Ok(Self { pointer: array.pointer, dtype: array.dtype })
    }
}
