//! Ranks joined by TCP, for runs without MPI: all talk to rank 0, which joins their values in the order of ranks.
//!
//! Made for small messages: rewards, metrics, flags, the id that NCCL starts with. The traffic of gradients grows with
//! the number of ranks at rank 0. Between hosts that trust their network: ranks know each other by a secret
//! ([`super::bootstrap`]), but what they say is not encrypted.

mod acceptor;
mod control;
mod descriptors;
mod handshake;
mod rendezvous;
mod wire;

use super::bootstrap::Meeting;
use super::plane::{self, Collective, Plane};
use super::transport::{Element, Transport};
use super::{Call, watch};
use crate::error::{Error, Result};
use control::Control;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wire::{Head, broken};

pub(super) use control::abort;
#[cfg(all(feature = "mpi", feature = "cuda"))]
pub(super) use control::joined;

/// Rank 0 tells which rank is late; the others wait this much longer for its word.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Connections of a rank to rank 0: control, host plane, device plane.
const CONNECTIONS: usize = 3;
const CONTROL: usize = 0;

/// One plane: a connection to rank 0, or rank 0's to all others.
pub(super) struct Tcp {
    rank: usize,
    ranks: usize,
    peers: Vec<Peer>,
    deadline: Duration,
    plane: Plane,
}

/// The other end of a connection.
struct Peer {
    rank: usize,
    host: String,
    stream: TcpStream,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "rank {} on {}", self.rank, self.host)
    }
}

/// The run's connections, from their beginning to their end.
pub(super) struct Session {
    control: Arc<Control>,
}

impl Session {
    /// Meets the other ranks, once in a process; the host plane and the device plane are joined. From then on a panic on
    /// any rank, a rank that is gone or silent, and a collective that lasts longer than `deadline` end the whole job.
    ///
    /// # Errors
    /// [`Error::Peer`] that names the ranks that did not come within `deadline`; [`Error::Usage`] where rank 0 refuses
    /// this one, or this process may not open as many connections.
    pub fn begin(meeting: &Meeting, deadline: Duration) -> Result<(Self, Tcp, Tcp)> {
        let hostname = crate::hostname::hostname();
        watch::name_self(Some(meeting.rank), &hostname);
        descriptors::provide(if meeting.rank == 0 { meeting.ranks - 1 } else { 1 })?;
        let peers = match meeting.rank {
            0 => rendezvous::receive(meeting, deadline)?,
            _ => vec![rendezvous::join(meeting, &hostname, deadline)?],
        };
        let [mut control, mut host, mut device] = [const { Vec::new() }; CONNECTIONS];
        for (rank, name, [c, h, d]) in peers {
            let peer = |stream| Peer { rank, host: name.clone(), stream };
            control.push(peer(c));
            host.push(peer(h));
            device.push(peer(d));
        }
        let control = Control::start(meeting.rank, control, deadline)?;
        // The connections tell sooner and more; this is for what waits for no connection.
        watch::arm(deadline + 2 * PATIENCE, abort)?;
        let (rank, ranks) = (meeting.rank, meeting.ranks);
        let of = |name, peers| Tcp { rank, ranks, peers, deadline, plane: Plane::new(name) };
        Ok((Self { control }, of(plane::HOST, host), of(plane::DEVICE, device)))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let ending = watch::waiting(Collective::unnumbered("finalize"));
        self.control.part();
        drop(ending);
        watch::disarm();
    }
}

impl Tcp {
    /// Rank 0's side: takes what every rank sends, gives every rank its result.
    fn serve<T: Element>(&self, call: Call, collective: Collective, head: Head, send: &[T]) -> Result<Vec<T>> {
        let end = Instant::now() + self.deadline;
        let mut received = Vec::with_capacity(self.peers.len());
        for peer in &self.peers {
            let values = head.of_sender(call, peer.rank, send.len()).receive(&peer.stream, end);
            received.push(values.map_err(|e| self.lost(collective, peer, e, end))?);
        }
        let results = join(call, self.ranks, send, &received);
        let end = Instant::now() + self.deadline;
        for peer in &self.peers {
            let part = results.of(call, peer.rank);
            head.with_length::<T>(part.len())
                .send(&peer.stream, part, end)
                .map_err(|e| self.lost(collective, peer, e, end))?;
        }
        Ok(results.of(call, 0).to_vec())
    }

    /// Another rank's side.
    fn ask<T: Element>(
        &self,
        call: Call,
        collective: Collective,
        head: Head,
        send: &[T],
        length: usize,
    ) -> Result<Vec<T>> {
        let peer = &self.peers[0];
        let end = Instant::now() + self.deadline + PATIENCE;
        let head = head.of_sender(call, self.rank, send.len());
        let mine = &send[..head.length::<T>()];
        let lost = |e| self.lost(collective, peer, e, end);
        head.send(&peer.stream, mine, end).map_err(lost)?;
        head.with_length::<T>(length).receive(&peer.stream, end).map_err(lost)
    }

    /// What to say of a connection that failed: ranks out of step, a late rank or one that is gone.
    fn lost(&self, collective: Collective, peer: &Peer, error: std::io::Error, end: Instant) -> Error {
        if broken(&error) {
            return Error::Failed(format!("ranks are out of step in {collective}: {peer} {error}"));
        }
        if Instant::now() < end {
            // The control connection ends this process with the reason, unless that is what is lost.
            std::thread::sleep(PATIENCE);
            return Error::Peer(format!("{collective}: the connection to {peer} is lost: {error}"));
        }
        let late = self.peers.iter().filter(|other| other.rank == peer.rank || wire::is_silent(&other.stream));
        let late = late.map(Peer::to_string).collect::<Vec<_>>().join(", ");
        let seconds = self.deadline.as_secs_f64();
        Error::Peer(format!(
            "{collective}: {late} did not come within the deadline of {seconds} s. Start the run again: it resumes from \
             the newest complete checkpoint"
        ))
    }
}

impl Transport for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.ranks
    }

    fn collective<T: Element>(&self, call: Call, send: &[T]) -> Result<Vec<T>> {
        let collective = self.plane.next(call);
        let _waiting = watch::waiting(collective);
        let head = Head::new::<T>(call, collective.number() as u32);
        let length = match call {
            Call::Barrier => 0,
            Call::Broadcast { .. } | Call::AllReduce(_) => send.len(),
            Call::AllGather => send.len() * self.ranks,
            Call::ReduceScatter(_) => send.len() / self.ranks,
        };
        match self.rank {
            0 => self.serve(call, collective, head, send),
            _ => self.ask(call, collective, head, send, length),
        }
    }

    fn abort(&self, code: i32) -> ! {
        abort(code)
    }
}

/// What a collective comes to: the same values for all ranks, or each rank its part.
struct Results<T> {
    all: Vec<T>,
    ranks: usize,
}

impl<T> Results<T> {
    fn of(&self, call: Call, rank: usize) -> &[T] {
        match call {
            Call::ReduceScatter(_) => {
                let length = self.all.len() / self.ranks;
                &self.all[rank * length..(rank + 1) * length]
            }
            _ => &self.all,
        }
    }
}

/// Always in the order of ranks, so that sums have the same bits whoever came first.
fn join<T: Element>(call: Call, ranks: usize, mine: &[T], others: &[Vec<T>]) -> Results<T> {
    let all = match call {
        Call::Barrier => Vec::new(),
        Call::Broadcast { root: 0 } => mine.to_vec(),
        Call::Broadcast { root } => others[root - 1].clone(),
        Call::AllGather => [mine].into_iter().chain(others.iter().map(Vec::as_slice)).flatten().copied().collect(),
        Call::AllReduce(op) | Call::ReduceScatter(op) => {
            let mut sum = mine.to_vec();
            for other in others {
                sum.iter_mut().zip(other).for_each(|(a, &b)| *a = a.join(b, op));
            }
            sum
        }
    };
    Results { all, ranks }
}
