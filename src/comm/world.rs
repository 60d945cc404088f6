//! The ranks of this run and the two planes they talk over.

use super::answers::{LARGE, SMALL, wrong_answer};
use super::bootstrap::Meeting;
use super::choice::{Backend, Build, Transport, choose};
use super::counted::{Counted, Sent};
use super::job::Job;
use super::launcher::{self, Launcher};
use super::place::Place;
use super::plane::{DEVICE, HOST};
use super::{Communicator, Solo, exchange, tcp, watch};
use crate::error::{EXIT_USAGE, Error, Result};
use crate::hostname::hostname;
use candle_core::Device;
#[cfg(feature = "cuda")]
use candle_core::Tensor;
use std::rc::Rc;
use std::time::Duration;

/// How the ranks of a command are joined.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The transport that the user asked for; none where the configuration that says so could not be read.
    pub backend: Option<Backend>,
    /// The longest that a collective may wait for a peer; later the whole job ends with
    /// [`crate::error::EXIT_RESTART`].
    pub deadline: Duration,
    /// What all ranks are started with, as text: over TCP it tells them from the ranks of another job.
    pub settings: Option<String>,
}

impl Launch {
    /// Ranks of one job alone.
    pub fn new(backend: Backend, deadline: Duration) -> Self {
        Self { backend: Some(backend), deadline, settings: None }
    }

    /// Of a rank that does not know how the others are joined: as they can be.
    fn transport(&self, launcher: Option<&Launcher>) -> Result<Transport> {
        let build = Build { mpi: cfg!(feature = "mpi"), nccl: cfg!(feature = "cuda") };
        match self.backend {
            Some(backend) => choose(backend, launcher, build),
            None => choose(Backend::Auto, launcher, Build { nccl: true, ..build }),
        }
    }
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

    /// The world that the launcher started this process in. Once in a process, because MPI starts once; without a launcher
    /// it is not even initialised.
    ///
    /// # Errors
    /// [`Error::Usage`] where launcher, backend and this build do not fit together, or MPI does not join the ranks that the
    /// launcher started.
    pub fn from_environment(launch: &Launch) -> Result<Self> {
        let variables = launcher::environment();
        let launcher = launcher::detect(&variables)?;
        match (launch.transport(launcher.as_ref())?, &launcher) {
            (Transport::Solo, _) | (_, None) => Ok(Self::solo()),
            (Transport::Mpi, Some(launcher)) => join_mpi(launcher, launch.deadline),
            (Transport::Tcp, Some(launcher)) => {
                let job = Job::new(launch.settings.as_deref());
                join_tcp(launcher, &Meeting::of(launcher, &variables, job)?, launch.deadline)
            }
        }
    }

    /// What each rank has prepared before it met the others, where all ranks have; so that a rank that cannot begin, because
    /// a file is missing on its host, ends the others at once. Collective.
    ///
    /// # Errors
    /// This rank's own; on the others that of the first such rank, with its name.
    pub fn all_ready<T>(&self, mine: Result<T>) -> Result<T> {
        type Failure = Option<(String, i32, String)>;
        let failure: Failure = mine.as_ref().err().map(|e| (self.hostname().into(), e.exit_code(), e.to_string()));
        let failures = exchange(&*self.host, &failure)?;
        let first = failures.into_iter().enumerate().find_map(|(rank, failure)| Some((rank, failure?)));
        match (mine, first) {
            (Ok(_), Some((rank, (host, code, message)))) => {
                let message = format!("rank {rank} on {host} cannot begin: {message}");
                Err(if code == EXIT_USAGE { Error::Usage(message) } else { Error::Failed(message) })
            }
            (mine, _) => mine,
        }
    }

    /// Checks the host plane, whose messages are small, by collectives whose answer is known. Collective, the same answer on
    /// every rank.
    ///
    /// # Errors
    /// [`Error::Failed`] that names the collective, the plane, the rank and its host.
    pub fn check_host_plane(&self) -> Result<()> {
        self.check_plane(&*self.host, HOST, &[SMALL], &Device::Cpu)
    }

    fn check_plane(&self, comm: &dyn Communicator, plane: &str, lengths: &[usize], device: &Device) -> Result<()> {
        let mut mine = None;
        for &length in lengths {
            let wrong = wrong_answer(comm, length, device)?;
            mine = mine.or(wrong);
        }
        let all = exchange(&*self.host, &(mine, self.hostname().to_string()))?;
        for (rank, (wrong, host)) in all.iter().enumerate() {
            if let Some(wrong) = wrong {
                let transport = self.describe();
                return Err(Error::Failed(format!(
                    "the {plane} plane computes wrongly on rank {rank} on {host}: {wrong}. The transport is broken there \
                     ({transport})"
                )));
            }
        }
        Ok(())
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
        world.check_plane(&*world.device, DEVICE, &[SMALL, LARGE], device)?;
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
fn join_mpi(launcher: &Launcher, deadline: Duration) -> Result<World> {
    let (session, host) = super::mpi::Session::begin(deadline)?;
    let library = super::Mpi::library();
    launcher.check_world(host.world_size(), &library)?;
    let place = Place::of(&host, hostname(), launcher)?;
    let device = super::background::Background::new(Box::new(host.duplicate()), super::mpi::abort)?;
    let transport = format!("over MPI ({library})");
    let world = World::new(Rc::new(device), Rc::new(host), place, transport);
    Ok(World { _session: Some(Rc::new(session)), ..world })
}

/// Not reached: `choose` refuses first.
#[cfg(not(feature = "mpi"))]
fn join_mpi(_: &Launcher, _: Duration) -> Result<World> {
    Err(Error::Failed("this program was built without MPI".into()))
}

/// The world without MPI, the device plane on a thread of its own.
fn join_tcp(launcher: &Launcher, meeting: &Meeting, deadline: Duration) -> Result<World> {
    let (session, host, device) = tcp::Session::begin(meeting, deadline)?;
    let place = Place::of(&host, hostname(), launcher)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Call, ThreadGroup};
    #[cfg(not(feature = "cuda"))]
    use candle_core::Tensor;

    #[test]
    fn worlds_describe_themselves() {
        assert_eq!(World::solo().describe(), "1 rank on 1 host alone");
        let all = ThreadGroup::run(2, |world| Ok(world.describe())).unwrap();
        assert_eq!(all, ["2 ranks on 1 host as threads"; 2]);
    }

    /// Rank 1's results of one kind of call are off by one in the last number, where they are long.
    struct Wrong(Rc<dyn Communicator>, &'static str);

    impl Communicator for Wrong {
        fn rank(&self) -> usize {
            self.0.rank()
        }
        fn world_size(&self) -> usize {
            self.0.world_size()
        }
        fn call(&self, call: Call, tensor: &Tensor) -> Result<Tensor> {
            let result = self.0.call(call, tensor)?;
            if self.rank() != 1 || call.name() != self.1 || result.elem_count() < 1000 {
                return Ok(result);
            }
            let mut values = result.to_vec1::<f32>()?;
            values.last_mut().into_iter().for_each(|value| *value += 1.0);
            Ok(Tensor::new(values, &Device::Cpu)?)
        }
        fn abort(&self, code: i32) -> ! {
            self.0.abort(code)
        }
    }

    #[test]
    fn a_wrong_answer_of_any_collective_is_told_with_its_rank() {
        let with = |wrong: &'static str| {
            ThreadGroup::run(3, |mut world| {
                world.check_host_plane()?;
                world.device = Rc::new(Wrong(world.device.clone(), wrong));
                world.check_plane(&*world.device, DEVICE, &[SMALL, LARGE], &Device::Cpu)
            })
        };
        with("nothing").unwrap();
        for name in ["broadcast", "all_reduce", "reduce_scatter", "all_gather"] {
            let message = with(name).unwrap_err().to_string();
            let begins = "the device plane computes wrongly on rank 1 on ";
            assert!(message.starts_with(begins) && message.contains(&format!(": {name} of ")), "{message}");
        }
    }
}
