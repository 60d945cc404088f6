//! Ranks joined by MPI, through host memory.
//!
//! Errors inside MPI end the job (its default handler): the safe wrappers give no return codes to look at.

use super::plane::{self, Collective, Plane};
use super::transport::{Element, Transport};
use super::{Call, ReduceOp, watch};
use crate::error::{Error, Result, failing};
use ::mpi::collective::SystemOperation;
use ::mpi::environment::{self, Universe};
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator as _, CommunicatorCollectives as _, Root as _};
use ::mpi::{Threading, ffi};
use std::time::Duration;

/// Elements of one MPI call: counts are i32 and some libraries count bytes in them as well.
const CHUNK: usize = 1 << 26;

/// MPI_Abort is given this long before the process ends itself.
const ABORT_PATIENCE: Duration = Duration::from_secs(3);

/// A communicator of a run that a launcher of MPI started.
pub struct Mpi {
    world: SimpleCommunicator,
    plane: Plane,
    chunk: usize,
}

/// MPI from its initialisation to its end, which must come after that of its communicators.
pub struct Session {
    universe: Option<Universe>,
}

// SAFETY: a communicator is a handle that any thread may use, because MPI gave MPI_THREAD_MULTIPLE ([`Session::begin`]);
// the session, which only the thread that began it may end, is not part of it.
unsafe impl Send for Mpi {}

impl Session {
    /// Initialises MPI, once in a process. From then on a panic on any thread of any rank ends the whole job (exit
    /// code 101), and so does a collective that lasts longer than `deadline` (exit code 75); the end of MPI, when the
    /// session is dropped, counts as a collective.
    ///
    /// # Errors
    /// [`Error::Usage`] where the library does not give MPI_THREAD_MULTIPLE.
    pub fn begin(deadline: Duration) -> Result<(Self, Mpi)> {
        let host = crate::hostname::hostname();
        watch::name_self(None, &host);
        watch::arm(deadline, abort)?;
        let starting = watch::waiting(Collective::unnumbered("init"));
        // The panic hook and the watchdog call MPI_Abort from other threads.
        let (universe, provided) = environment::initialize_with_threading(Threading::Multiple)
            .ok_or_else(|| Error::Failed("MPI was already initialised in this process".into()))?;
        drop(starting);
        if provided != Threading::Multiple {
            return Err(Error::Usage(format!(
                "{} lets one thread of a rank talk at a time (MPI_THREAD_{}), and two do here: take an MPI that is built for \
                 MPI_THREAD_MULTIPLE",
                Mpi::library(),
                format!("{provided:?}").to_uppercase()
            )));
        }
        let world = universe.world();
        watch::name_self(Some(world.rank() as usize), &host);
        Ok((Self { universe: Some(universe) }, Mpi { world, plane: Plane::new(plane::HOST), chunk: CHUNK }))
    }
}

impl Mpi {
    /// The same ranks again, for another thread: collectives of the two do not meet. Collective.
    pub fn duplicate(&self) -> Self {
        let _waiting = watch::waiting(Collective::unnumbered("duplicate"));
        Self { world: self.world.duplicate(), plane: Plane::new(plane::DEVICE), chunk: self.chunk }
    }

    /// The same ranks again with at most `elements` in one MPI call.
    pub fn with_chunk(&self, elements: usize) -> Self {
        Self { chunk: elements.max(1), ..self.duplicate() }
    }

    /// Name and version of the library: "Open MPI 4.1.4".
    pub fn library() -> String {
        short_version(&environment::library_version().unwrap_or_default())
    }

    /// `[S]` of every rank to `[R*S]`.
    fn gather<T: Element>(&self, send: &[T]) -> Vec<T> {
        let (world, ranks, length) = (&self.world, self.world_size(), send.len());
        let mut all = vec![T::default(); ranks * length];
        let width = (self.chunk / ranks).max(1);
        if length <= width {
            world.all_gather_into(send, &mut all[..]);
            return all;
        }
        let mut part = vec![T::default(); ranks * width];
        for start in (0..length).step_by(width) {
            let width = width.min(length - start);
            let part = &mut part[..ranks * width];
            world.all_gather_into(&send[start..start + width], part);
            for (rank, piece) in part.chunks(width).enumerate() {
                all[rank * length + start..][..width].copy_from_slice(piece);
            }
        }
        all
    }

    /// `[R*S]` of every rank to this rank's `[S]` of their reduction.
    fn scatter<T: Element>(&self, send: &[T], op: SystemOperation) -> Vec<T> {
        let (world, ranks, length) = (&self.world, self.world_size(), send.len() / self.world_size());
        let mut mine = vec![T::default(); length];
        let width = (self.chunk / ranks).max(1);
        if length <= width {
            world.reduce_scatter_block_into(send, &mut mine[..], op);
            return mine;
        }
        let mut part = vec![T::default(); ranks * width];
        for start in (0..length).step_by(width) {
            let width = width.min(length - start);
            let part = &mut part[..ranks * width];
            for (rank, piece) in part.chunks_mut(width).enumerate() {
                piece.copy_from_slice(&send[rank * length + start..][..width]);
            }
            world.reduce_scatter_block_into(&*part, &mut mine[start..start + width], op);
        }
        mine
    }
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn world_size(&self) -> usize {
        self.world.size() as usize
    }

    fn collective<T: Element>(&self, call: Call, send: &[T]) -> Result<Vec<T>> {
        if send.is_empty() && call != Call::Barrier {
            // Nothing to say, on every rank alike; Open MPI refuses the two empty vectors' equal addresses.
            return Ok(Vec::new());
        }
        let _waiting = watch::waiting(self.plane.next(call));
        let world = &self.world;
        let result = match call {
            Call::Barrier => {
                world.barrier();
                Vec::new()
            }
            Call::Broadcast { root } => {
                let mut result = send.to_vec();
                let root = world.process_at_rank(root as i32);
                result.chunks_mut(self.chunk).for_each(|part| root.broadcast_into(part));
                result
            }
            Call::AllReduce(op) => {
                let mut result = vec![T::default(); send.len()];
                for (send, result) in send.chunks(self.chunk).zip(result.chunks_mut(self.chunk)) {
                    world.all_reduce_into(send, result, operation(op));
                }
                result
            }
            Call::AllGather => self.gather(send),
            Call::ReduceScatter(op) => self.scatter(send, operation(op)),
        };
        Ok(result)
    }

    fn abort(&self, code: i32) -> ! {
        abort(code)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The end of MPI waits for all peers, like any collective.
        let ending = watch::waiting(Collective::unnumbered("finalize"));
        self.universe.take();
        drop(ending);
        watch::disarm();
    }
}

fn operation(op: ReduceOp) -> SystemOperation {
    match op {
        ReduceOp::Sum => SystemOperation::sum(),
        ReduceOp::Max => SystemOperation::max(),
    }
}

/// Ends all ranks. May be called on any thread at any time.
pub(super) fn abort(code: i32) -> ! {
    let code = failing(code);
    leave_word(code);
    if environment::is_initialized() && !environment::is_finalized() {
        // A net for the case that MPI itself is what hangs; without the thread MPI_Abort still has its chance.
        let _ = std::thread::Builder::new().spawn(move || {
            std::thread::sleep(ABORT_PATIENCE);
            signal_hook::low_level::exit(code)
        });
        // SAFETY: MPI is initialised, and gave MPI_THREAD_MULTIPLE, so that any thread may call it.
        unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
    }
    signal_hook::low_level::exit(code)
}

/// Leaves the exit code of the job where the script that started it looks (launch/supervise.sh): its launcher may hang in
/// its own end, or end with a code of its own.
fn leave_word(code: i32) {
    if let Some(path) = std::env::var_os("FLOWRL_MARK")
        && let Ok(mut file) = std::fs::OpenOptions::new().append(true).open(path)
        && file.metadata().is_ok_and(|metadata| metadata.len() == 0)
    {
        let _ = std::io::Write::write_all(&mut file, code.to_string().as_bytes());
    }
}

/// "Open MPI v4.1.4, package: ..." and "MPICH Version:\t4.0.2\n..." to name and number.
fn short_version(long: &str) -> String {
    let first = long.lines().next().unwrap_or_default();
    let first = first.split(',').next().unwrap_or_default();
    let words = first.replace("Version:", "").replace(" v", " ");
    match words.split_whitespace().collect::<Vec<_>>().join(" ") {
        name if name.is_empty() => "an unknown MPI library".into(),
        name => name,
    }
}

#[cfg(test)]
mod tests {
    use super::short_version;

    #[test]
    fn names_libraries() {
        assert_eq!(short_version("Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4\0"), "Open MPI 4.1.4");
        assert_eq!(short_version("MPICH Version:\t4.0.2\nMPICH Release date:\tsome day"), "MPICH 4.0.2");
        assert_eq!(short_version(""), "an unknown MPI library");
    }
}
