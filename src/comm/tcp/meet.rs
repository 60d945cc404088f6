//! How the ranks find each other: rank 0 listens, the others come with all their connections.

use super::handshake::{self, Hello, Visitor};
use super::{CONNECTIONS, CONTROL, control, descriptors, wire};
use crate::comm::bootstrap::{self, Meeting};
use crate::comm::job::Job;
use crate::error::{Error, Result};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A connection that was let in, or why none can come any more.
type Admission = Result<(Hello, TcpStream)>;

/// A rank, its host and its connections.
pub(super) type Arrival = (usize, String, [TcpStream; CONNECTIONS]);

/// Strangers that are examined at once; further ones are sent away.
const VISITORS: usize = 128;

/// Refused strangers that are told of.
const TOLD: usize = 8;

/// A rank whose connection is refused or whose name is unknown tries again after this.
const AGAIN: Duration = Duration::from_millis(250);

/// A rank that has no connection yet says so after this.
const IMPATIENT: Duration = Duration::from_secs(15);

/// Rank 0: waits for all connections of all other ranks. The door stays open after that, to tell latecomers that they are
/// none of us.
///
/// # Errors
/// [`Error::Usage`] where the port is taken, [`Error::Peer`] that names the ranks that have not come by the deadline,
/// [`Error::Failed`] where no further connection can be opened.
pub(super) fn receive(meeting: &Meeting, deadline: Duration) -> Result<Vec<Arrival>> {
    let end = Instant::now() + deadline;
    let listener = listen(meeting.port)?;
    let (sender, receiver) = channel();
    let door = Arc::new(Door {
        key: meeting.key,
        job: meeting.job.clone(),
        ranks: meeting.ranks,
        processes: Mutex::new(vec![None; meeting.ranks]),
        visitors: AtomicUsize::new(0),
        refused: AtomicUsize::new(0),
        arrivals: Mutex::new(sender),
    });
    let failed = |e| Error::Failed(format!("the thread of new connections could not be started: {e}"));
    std::thread::Builder::new().name("door".into()).spawn(move || open(&listener, &door)).map_err(failed)?;
    gather(meeting, &receiver, end, deadline)
}

/// On all networks of this host, because the others may know it by any of its addresses.
fn listen(port: u16) -> Result<TcpListener> {
    let bound =
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)));
    bound.map_err(|e| match descriptors::are_out(&e) {
        true => descriptors::out(&e),
        false => Error::Usage(format!(
            "rank 0 cannot listen on port {port}: {e}; set MASTER_PORT to a free port of its host, the same on all ranks"
        )),
    })
}

fn gather(meeting: &Meeting, arrivals: &Receiver<Admission>, end: Instant, deadline: Duration) -> Result<Vec<Arrival>> {
    let mut hosts = vec![String::new(); meeting.ranks];
    let mut streams: Vec<[Option<TcpStream>; CONNECTIONS]> =
        (0..meeting.ranks).map(|_| [const { None }; CONNECTIONS]).collect();
    while streams[1..].iter().flatten().any(Option::is_none) {
        match arrivals.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Err(out)) => return Err(out),
            Ok(Ok((hello, stream))) => {
                hosts[hello.rank] = hello.host;
                // In the place of an earlier one, whose handshake stalled: then the rank tried again.
                streams[hello.rank][hello.connection] = Some(stream);
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                let come = |rank: &usize| streams[*rank].iter().all(Option::is_some);
                let (here, missing): (Vec<_>, Vec<_>) = (1..meeting.ranks).partition(come);
                for rank in here {
                    streams[rank][CONTROL].iter().for_each(control::send_away);
                }
                let Meeting { host, port, ranks, .. } = meeting;
                return Err(Error::Peer(format!(
                    "{} of {ranks} did not come to {host}, port {port}, within {} s; were they started, and does a \
                     firewall let them through?",
                    list(&missing),
                    deadline.as_secs_f64()
                )));
            }
        }
    }
    let whole = |(rank, streams): (usize, [Option<TcpStream>; CONNECTIONS])| {
        let [Some(a), Some(b), Some(c)] = streams else { return None };
        Some((rank, std::mem::take(&mut hosts[rank]), [a, b, c]))
    };
    Ok(streams.into_iter().enumerate().filter_map(whole).collect())
}

/// "rank 3" or "ranks 3, 5".
fn list(ranks: &[usize]) -> String {
    let numbers = ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    format!("rank{} {numbers}", if ranks.len() == 1 { "" } else { "s" })
}

/// Where rank 0 lets the others in.
struct Door {
    key: [u8; 32],
    job: Job,
    ranks: usize,
    /// The process that is each rank, once it has come.
    processes: Mutex<Vec<Option<u64>>>,
    visitors: AtomicUsize,
    refused: AtomicUsize,
    arrivals: Mutex<Sender<Admission>>,
}

/// Lets visitors in one by one, each examined on a thread of its own, so that a slow one holds up nobody.
fn open(listener: &TcpListener, door: &Arc<Door>) {
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(e) => {
                door.end_if_out(&e);
                std::thread::sleep(AGAIN);
                continue;
            }
        };
        if door.visitors.fetch_add(1, Ordering::SeqCst) >= VISITORS {
            door.visitors.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let its = door.clone();
        let examine = move || {
            let address =
                stream.peer_addr().map_or_else(|_| "an unknown address".into(), |address| address.ip().to_string());
            if let Err(e) = its.admit(stream) {
                if its.refused.fetch_add(1, Ordering::SeqCst) < TOLD {
                    eprintln!("{}", crate::comm::watch::signed(&format!("refused a connection from {address}: {e}")));
                }
                its.end_if_out(&e);
            }
            its.visitors.fetch_sub(1, Ordering::SeqCst);
        };
        if let Err(e) = std::thread::Builder::new().name("visitor".into()).spawn(examine) {
            door.visitors.fetch_sub(1, Ordering::SeqCst);
            door.send(Err(Error::Failed(format!(
                "the thread of a new connection could not be started: {e}; let this user have more threads (ulimit -u)"
            ))));
        }
    }
}

impl Door {
    fn admit(&self, stream: TcpStream) -> std::io::Result<()> {
        let visitor = Visitor::examine(stream, &self.key)?;
        let hello = visitor.hello.clone();
        if let Err(why) = self.check(&hello) {
            visitor.refuse(&self.key, &why)?;
            return Err(std::io::Error::new(ErrorKind::PermissionDenied, why));
        }
        let stream = visitor.admit(&self.key)?;
        self.send(Ok((hello, stream)));
        Ok(())
    }

    /// Nobody waits for it any more where the deadline has passed.
    fn send(&self, admission: Admission) {
        let _ = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).send(admission);
    }

    /// Ends the meeting where an error is of the kind that comes again with the next connection.
    fn end_if_out(&self, error: &std::io::Error) {
        if descriptors::are_out(error) {
            self.send(Err(descriptors::out(error)));
        }
    }

    /// Why this one may not come in.
    fn check(&self, hello: &Hello) -> std::result::Result<(), String> {
        let Hello { rank, ranks, connection, host, process, job } = hello;
        if !self.job.includes(job) {
            return Err(format!(
                "rank {rank} on {host} is of another job ({job}) than rank 0 ({}): give each job a MASTER_PORT of its own, \
                 and all ranks of one the same command",
                self.job
            ));
        }
        if *ranks != self.ranks {
            return Err(format!(
                "rank {rank} on {host} was started as one of {ranks} ranks, rank 0 as one of {}",
                self.ranks
            ));
        }
        if *rank == 0 || *rank >= self.ranks || *connection >= CONNECTIONS {
            return Err(format!(
                "there is no place for rank {rank} of {ranks} on {host}: two processes were given one rank"
            ));
        }
        let mut processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        if processes[*rank].get_or_insert(*process) != process {
            return Err(format!("rank {rank} is here already; the one on {host} is a second one"));
        }
        Ok(())
    }
}

/// Another rank: connects to rank 0, as soon as it listens.
///
/// # Errors
/// [`Error::Usage`] where rank 0 refuses it, [`Error::Peer`] where nobody listens by the deadline, or where not all ranks
/// came.
pub(super) fn join(meeting: &Meeting, hostname: &str, deadline: Duration) -> Result<Arrival> {
    let end = Instant::now() + deadline;
    let mut streams = Vec::with_capacity(CONNECTIONS);
    let bytes = bootstrap::random().map_err(|e| Error::Failed(format!("there are no random numbers: {e}")))?;
    let process = bytes.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte));
    for connection in 0..CONNECTIONS {
        let (rank, ranks, job) = (meeting.rank, meeting.ranks, meeting.job.clone());
        let hello = Hello { rank, ranks, connection, host: hostname.into(), process, job };
        streams.push(connect(meeting, &hello, end, deadline)?);
    }
    let [control, host, device] = streams.try_into().map_err(|_| Error::Failed("a connection is missing".into()))?;
    Ok((0, meeting.host.clone(), [control, host, device]))
}

fn connect(meeting: &Meeting, hello: &Hello, end: Instant, deadline: Duration) -> Result<TcpStream> {
    let Meeting { host, port, key, .. } = meeting;
    let mut impatient = Instant::now() + IMPATIENT;
    loop {
        let error =
            match attempt(host, *port).and_then(|stream| handshake::present(&stream, key, hello).map(|()| stream)) {
                Ok(stream) => return Ok(stream),
                Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                    return Err(Error::Usage(format!(
                        "rank 0 at {host}, port {port}, does not let rank {} in: {e}",
                        hello.rank
                    )));
                }
                Err(e) if descriptors::are_out(&e) => return Err(descriptors::out(&e)),
                Err(e) => e,
            };
        if Instant::now() >= end {
            let seconds = deadline.as_secs_f64();
            return Err(Error::Peer(format!("rank 0 was not at {host}, port {port}, within {seconds} s: {error}")));
        }
        if Instant::now() >= impatient {
            impatient = end;
            eprintln!("{}", crate::comm::watch::signed(&format!("waits for rank 0 at {host}, port {port}: {error}")));
        }
        std::thread::sleep(AGAIN);
    }
}

/// One try of all addresses of the name.
fn attempt(host: &str, port: u16) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::new(ErrorKind::NotFound, format!("{host} has no address"));
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, handshake::LIMIT) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Waits for one word.
pub(super) fn await_word(stream: &TcpStream, end: Instant) -> std::io::Result<control::Word> {
    let mut bytes = [0; control::LENGTH];
    wire::read(stream, &mut bytes, end)?;
    control::Word::decode(bytes).ok_or_else(|| std::io::Error::new(ErrorKind::InvalidData, "an unknown word"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    /// A rank whose handshake stalls gives up the connection and tries again, however far rank 0 had come with the first one.
    #[test]
    fn a_connection_takes_the_place_of_an_earlier_one_of_its_process() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let key = [7; 32];
        let job = Job::new(None);
        let meeting = Meeting { rank: 0, ranks: 2, host: "127.0.0.1".into(), port, key, job: job.clone() };
        let present = |process: u64, connection: usize| {
            let hello = Hello { rank: 1, ranks: 2, connection, host: "n2".into(), process, job: job.clone() };
            connect(&meeting, &hello, Instant::now() + handshake::LIMIT, handshake::LIMIT)
        };
        std::thread::scope(|scope| {
            let arrivals = scope.spawn(|| receive(&meeting, 2 * handshake::LIMIT));
            drop(present(1, 0).unwrap());
            let second = present(2, 0).unwrap_err();
            assert!(matches!(&second, Error::Usage(line) if line.contains("is here already")), "{second}");
            let mut mine: Vec<TcpStream> = (0..CONNECTIONS).map(|connection| present(1, connection).unwrap()).collect();
            let arrivals = arrivals.join().unwrap().unwrap();
            let [(1, host, theirs)] = &arrivals[..] else { panic!("{arrivals:?}") };
            assert_eq!(host, "n2");
            for (connection, (mine, mut theirs)) in mine.iter_mut().zip(theirs).enumerate() {
                mine.write_all(&[connection as u8]).unwrap();
                let mut heard = [9];
                theirs.read_exact(&mut heard).unwrap();
                assert_eq!(heard, [connection as u8]);
            }
        });
    }
}
