//! The ranks of this run and the two planes they talk over.

use super::answers::device_plane_answers;
use super::bootstrap::Meeting;
use super::counted::{Counted, Sent};
use super::launcher::{self, Build, Transport};
use super::{Communicator, Solo, exchange, tcp, watch};
use crate::error::{Error, Result};
use candle_core::Device;
#[cfg(feature = "cuda")]
use candle_core::Tensor;
use std::rc::Rc;
use std::time::Duration;

/// Which transport joins the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// By the launcher that is found in the environment.
    Auto,
    /// One rank, no peers.
    Solo,
    /// MPI, by mpirun or `srun --mpi=pmix`.
    Mpi,
    /// TCP, by any launcher that tells ranks and where rank 0 is; on CPUs for tests.
    Tcp,
}

/// Where this rank runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The name of the host.
    pub hostname: String,
    /// This rank among those of its host, `0..ranks_on_host`: the number of its GPU.
    pub local_rank: usize,
    /// Number of ranks on this host.
    pub ranks_on_host: usize,
    /// Number of hosts of the run.
    pub hosts: usize,
}

/// The ranks of this run. MPI ends when the last clone is dropped: hold one until the end of main.
#[derive(Clone)]
pub struct World {
    /// Gradients and parameters.
    pub device: Rc<dyn Communicator>,
    /// Rewards, metrics, digests and flags.
    pub host: Rc<dyn Communicator>,
    place: Place,
    transport: String,
    sent: Rc<Sent>,
    /// What must outlive the planes: dropped last, because declared last.
    _session: Option<Rc<dyn std::any::Any>>,
}

impl World {
    /// The device plane is counted.
    fn new(device: Rc<dyn Communicator>, host: Rc<dyn Communicator>, place: Place, transport: String) -> Self {
        let sent = Rc::new(Sent::default());
        let device = Rc::new(Counted::new(device, sent.clone()));
        Self { device, host, place, transport, sent, _session: None }
    }

    /// One rank alone.
    pub fn solo() -> Self {
        let place = Place { hostname: hostname(), local_rank: 0, ranks_on_host: 1, hosts: 1 };
        Self::new(Rc::new(Solo), Rc::new(Solo), place, "alone".into())
    }

    /// The world that the launcher started this process in. Once in a process, because MPI starts once.
    ///
    /// `deadline` is the longest that a collective may wait for a peer; later the whole job ends with
    /// [`crate::error::EXIT_RESTART`]. Without a launcher MPI is not even initialised.
    ///
    /// # Errors
    /// [`Error::Usage`] where launcher, `backend` and this build do not fit together.
    pub fn from_environment(backend: Backend, deadline: Duration) -> Result<Self> {
        let variables = launcher::environment();
        let build = Build { mpi: cfg!(feature = "mpi"), nccl: cfg!(feature = "cuda") };
        let place = |host: &dyn Communicator| place(host, hostname(), launcher::local(&variables));
        match launcher::choose(backend, &launcher::detect(&variables), build)? {
            Transport::Solo => Ok(Self::solo()),
            Transport::Mpi => join_mpi(deadline, place),
            Transport::Tcp => join_tcp(&Meeting::of(&variables)?, deadline, place),
        }
    }

    /// The same ranks with their parameters and gradients on `device`: where those are GPUs, NCCL joins them. What joins
    /// them now has answered right. Collective.
    ///
    /// # Errors
    /// [`Error::Usage`] where only some ranks have a GPU, two share one, or NCCL is missing; [`Error::Peer`] where a rank
    /// does not come within `deadline`; [`Error::Failed`] where a collective on the device plane gives a wrong answer.
    pub fn on(&self, device: &Device, deadline: Duration) -> Result<Self> {
        if self.world_size() == 1 {
            return Ok(self.clone());
        }
        let gpus = exchange(&*self.host, &(self.hostname().to_owned(), crate::device::identity(device)?))?;
        let rank = |has_gpu: bool| gpus.iter().position(|(_, gpu)| gpu.is_some() == has_gpu);
        let world = match (rank(true), rank(false)) {
            (None, _) => self.clone(),
            (Some(_), None) => self.over_nccl(device, &gpus, deadline)?,
            (Some(with), Some(without)) => {
                return Err(Error::Usage(format!(
                    "rank {with} on {} has a GPU, rank {without} on {} has none: look there for a driver and CUDA's \
                     libraries, or set parallel.device = \"cpu\"",
                    gpus[with].0, gpus[without].0
                )));
            }
        };
        device_plane_answers(&world, device)?;
        Ok(world)
    }

    #[cfg(feature = "cuda")]
    fn over_nccl(&self, device: &Device, gpus: &[(String, Option<String>)], deadline: Duration) -> Result<Self> {
        use super::nccl::{ID_BYTES, Membership, Nccl};
        if let Some((first, second)) = twice(gpus)
            && !crate::device::may_be_shared()
        {
            return Err(Error::Usage(format!(
                "ranks {first} and {second} on {} are on the same GPU: start one rank for each GPU ({})",
                gpus[first].0,
                crate::device::how_to_share()
            )));
        }
        // NCCL refuses two ranks of one host on one GPU; with names of their own they are on different hosts.
        if let Some((first, second)) = twice(gpus)
            && std::env::var_os(HOST_ID).is_none()
        {
            return Err(Error::Usage(format!(
                "ranks {first} and {second} on {} share a GPU, and {HOST_ID} is not set: start each rank with a value of its \
                 own, such as its number",
                gpus[first].0
            )));
        }
        let mine = if self.rank() == 0 { Nccl::new_id()?.to_vec() } else { vec![0; ID_BYTES] };
        let id = self.host.broadcast(&Tensor::from_vec(mine, ID_BYTES, &Device::Cpu)?, 0)?.to_vec1::<u8>()?;
        let id = id.try_into().map_err(|_| Error::Failed("the id of NCCL has another length".into()))?;
        let (rank, world_size) = (self.rank(), self.world_size());
        let nccl = Nccl::join(device, &Membership { id, rank, world_size, deadline, abort: end_all_ranks })?;
        let transport = format!("{}, GPUs over {}", self.transport, Nccl::library());
        let device = Rc::new(Counted::new(Rc::new(nccl), self.sent.clone()));
        Ok(Self { device, transport, ..self.clone() })
    }

    /// Not reached: no rank has a GPU.
    #[cfg(not(feature = "cuda"))]
    fn over_nccl(&self, _: &Device, _: &[(String, Option<String>)], _: Duration) -> Result<Self> {
        Err(Error::Failed("this program was built without CUDA".into()))
    }

    /// One thread of a group.
    pub(super) fn of_threads(device: Rc<dyn Communicator>, host: Rc<dyn Communicator>) -> Self {
        let (local_rank, ranks_on_host) = (host.rank(), host.world_size());
        let place = Place { hostname: hostname(), local_rank, ranks_on_host, hosts: 1 };
        Self::new(device, host, place, "as threads".into())
    }

    /// This rank, `0..world_size`.
    pub fn rank(&self) -> usize {
        self.host.rank()
    }

    /// Number of ranks R.
    pub fn world_size(&self) -> usize {
        self.host.world_size()
    }

    /// Bytes that this rank has sent on the device plane, counted as the least that its collectives can do with.
    pub fn sent(&self) -> u64 {
        self.sent.bytes.get()
    }

    /// Collectives that this rank has called on the device plane.
    pub fn calls(&self) -> u64 {
        self.sent.calls.get()
    }

    /// The name of this host.
    pub fn hostname(&self) -> &str {
        &self.place.hostname
    }

    /// Where this rank runs.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// One line on the run: "2 ranks on 1 host over MPI (Open MPI 4.1.4)".
    pub fn describe(&self) -> String {
        let plural = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        let (ranks, hosts) = (plural(self.world_size(), "rank"), plural(self.place.hosts, "host"));
        format!("{ranks} on {hosts} {}", self.transport)
    }

    /// Ends the whole job at once with this exit code, for an error that peers do not share: returning it from main
    /// would wait for peers that wait for this rank.
    pub fn abort(&self, code: i32, message: &str) -> ! {
        eprintln!("{}", watch::signed(message));
        self.host.abort(code)
    }
}

/// The world of MPI: the device plane on a thread of its own.
#[cfg(feature = "mpi")]
fn join_mpi(deadline: Duration, place: impl FnOnce(&dyn Communicator) -> Result<Place>) -> Result<World> {
    let (session, host) = super::mpi::Session::begin(deadline)?;
    let place = place(&host)?;
    let device = super::background::Background::new(Box::new(host.duplicate()), super::mpi::abort)?;
    let transport = format!("over MPI ({})", super::Mpi::library());
    let world = World::new(Rc::new(device), Rc::new(host), place, transport);
    Ok(World { _session: Some(Rc::new(session)), ..world })
}

/// Not reached: `launcher::choose` refuses first.
#[cfg(not(feature = "mpi"))]
fn join_mpi(_: Duration, _: impl FnOnce(&dyn Communicator) -> Result<Place>) -> Result<World> {
    Err(Error::Failed("this program was built without MPI".into()))
}

/// The world without MPI, the device plane on a thread of its own.
fn join_tcp(
    meeting: &Meeting,
    deadline: Duration,
    place: impl FnOnce(&dyn Communicator) -> Result<Place>,
) -> Result<World> {
    let (session, host, device) = tcp::Session::begin(meeting, deadline)?;
    let place = place(&host)?;
    let device = super::background::Background::new(Box::new(device), tcp::abort)?;
    let transport = format!("over TCP (rank 0 at {}, port {})", meeting.host, meeting.port);
    let world = World::new(Rc::new(device), Rc::new(host), place, transport);
    Ok(World { _session: Some(Rc::new(session)), ..world })
}

/// NCCL's name for a host.
#[cfg(feature = "cuda")]
const HOST_ID: &str = "NCCL_HOSTID";

/// The first two ranks that are on the same GPU.
#[cfg(feature = "cuda")]
fn twice(gpus: &[(String, Option<String>)]) -> Option<(usize, usize)> {
    let first = |rank: usize| gpus.iter().position(|(_, gpu)| *gpu == gpus[rank].1);
    (0..gpus.len()).find_map(|rank| first(rank).filter(|&first| first < rank).map(|first| (first, rank)))
}

/// Ends all ranks, from any thread.
#[cfg(feature = "cuda")]
fn end_all_ranks(code: i32) -> ! {
    #[cfg(feature = "mpi")]
    if !tcp::joined() {
        super::mpi::abort(code);
    }
    tcp::abort(code)
}

/// The name of this host.
pub(crate) fn hostname() -> String {
    gethostname::gethostname().to_string_lossy().into_owned()
}

/// Counts the ranks by host: by the launcher's word, because containers on different hosts may share a name; by names
/// where a launcher tells nothing.
fn place(comm: &dyn Communicator, hostname: String, told: (Option<usize>, Option<usize>)) -> Result<Place> {
    let all = exchange(comm, &(hostname.clone(), told.0, told.1))?;
    let same = |name: &String| *name == hostname;
    let local_rank = told.0.unwrap_or_else(|| all[..comm.rank()].iter().filter(|(name, ..)| same(name)).count());
    let ranks_on_host = told.1.unwrap_or_else(|| all.iter().filter(|(name, ..)| same(name)).count());
    if local_rank >= ranks_on_host {
        return Err(Error::Failed(format!(
            "the launcher calls this rank number {local_rank} of {ranks_on_host} on {hostname}: hosts need different names"
        )));
    }
    let hosts = match all.iter().map(|(_, local_rank, _)| *local_rank).collect::<Option<Vec<_>>>() {
        Some(local_ranks) => local_ranks.iter().filter(|&&local_rank| local_rank == 0).count(),
        None => all.iter().map(|(name, ..)| name).collect::<std::collections::BTreeSet<_>>().len(),
    };
    Ok(Place { hostname, local_rank, ranks_on_host, hosts })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::ThreadGroup;

    /// Local rank, ranks on the host and hosts of every rank.
    fn places(names: [&str; 4], told: [(Option<usize>, Option<usize>); 4]) -> Vec<(usize, usize, usize)> {
        ThreadGroup::run(4, |world| {
            let rank = world.rank();
            let place = place(&*world.host, names[rank].into(), told[rank])?;
            Ok((place.local_rank, place.ranks_on_host, place.hosts))
        })
        .unwrap()
    }

    #[test]
    fn ranks_are_counted_by_host() {
        let untold = [(None, None); 4];
        assert_eq!(places(["a", "b", "a", "a"], untold), [(0, 3, 2), (0, 1, 2), (1, 3, 2), (2, 3, 2)]);
        let told = [0, 0, 1, 1].map(|rank| (Some(rank), Some(2)));
        assert_eq!(places(["c"; 4], told), [(0, 2, 2), (0, 2, 2), (1, 2, 2), (1, 2, 2)]);
    }

    #[test]
    fn worlds_describe_themselves() {
        assert_eq!(World::solo().describe(), "1 rank on 1 host alone");
        let all = ThreadGroup::run(2, |world| Ok(world.describe())).unwrap();
        assert_eq!(all, ["2 ranks on 1 host as threads"; 2]);
    }
}
