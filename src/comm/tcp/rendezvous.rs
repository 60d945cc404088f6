//! How the ranks find each other: rank 0 listens, the others come with all their connections.

use super::acceptor::{Acceptor, Admission};
use super::handshake::{self, Hello};
use super::{CONNECTIONS, CONTROL, control, descriptors};
use crate::comm::bootstrap::{self, Meeting};
use crate::error::{EXIT_RESTART, EXIT_USAGE, Error, Result};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// A rank, its host and its connections.
pub(super) type Arrival = (usize, String, [TcpStream; CONNECTIONS]);

/// A rank whose connection is refused or whose name is unknown tries again after this.
const AGAIN: Duration = Duration::from_millis(250);

/// A rank that has no connection yet says so after this.
const IMPATIENT: Duration = Duration::from_secs(15);

/// Rank 0 listens this much longer where a rank of its job was started for something else: the others are told, too.
const LAST: Duration = Duration::from_secs(5);

/// Rank 0: waits for all connections of all other ranks. The acceptor listens on after that, to tell latecomers that they
/// are none of us.
///
/// # Errors
/// [`Error::Usage`] where nobody can find this host by its name, the port is taken, or a rank of this job was started for something else; [`Error::Peer`] that
/// names the ranks that have not come by the deadline; [`Error::Failed`] where no further connection can be opened.
pub(super) fn receive(meeting: &Meeting, deadline: Duration) -> Result<Vec<Arrival>> {
    let end = Instant::now() + deadline;
    let listener = bind(meeting.port)?;
    look_up(&meeting.host, meeting.port, IMPATIENT.min(deadline))?;
    let (sender, receiver) = channel();
    let acceptor = Acceptor::new(meeting, sender);
    let failed = |e| Error::Failed(format!("the thread of new connections could not be started: {e}"));
    std::thread::Builder::new().name("acceptor".into()).spawn(move || acceptor.listen(&listener)).map_err(failed)?;
    let mut gathering = Gathering::new(meeting.ranks);
    match gathering.run(meeting, &receiver, end)? {
        true => Ok(gathering.arrivals()),
        false => Err(gathering.give_up(meeting, deadline)),
    }
}

/// Refuses a name of this host that has no address: the others look for it by that, and would wait until the deadline.
/// Services that give out names may need a moment for a new one.
fn look_up(host: &str, port: u16, patience: Duration) -> Result<()> {
    let end = Instant::now() + patience;
    while let Err(e) = (host, port).to_socket_addrs() {
        if Instant::now() >= end {
            return Err(Error::Usage(format!(
                "rank 0 cannot look up its own host, {host:?} ({e}), and the other ranks look for it by that name; set \
                 MASTER_ADDR to a name or an address of rank 0's host that all hosts know"
            )));
        }
        std::thread::sleep(AGAIN);
    }
    Ok(())
}

/// On all networks of this host, because the others may know it by any of its addresses.
fn bind(port: u16) -> Result<TcpListener> {
    let bound =
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)));
    bound.map_err(|e| match descriptors::are_out(&e) {
        true => descriptors::out(&e),
        false => Error::Usage(format!(
            "rank 0 cannot listen on port {port}: {e}; set MASTER_PORT to a free port of its host, the same on all ranks"
        )),
    })
}

/// Who has come so far.
struct Gathering {
    hosts: Vec<String>,
    streams: Vec<[Option<TcpStream>; CONNECTIONS]>,
    /// Ranks that were started for something else, and why they were refused.
    refused: BTreeMap<usize, String>,
}

impl Gathering {
    fn new(ranks: usize) -> Self {
        let streams = (0..ranks).map(|_| [const { None }; CONNECTIONS]).collect();
        Self { hosts: vec![String::new(); ranks], streams, refused: BTreeMap::new() }
    }

    fn has_come(&self, rank: usize) -> bool {
        self.streams[rank].iter().all(Option::is_some)
    }

    /// Whether all have come, at the latest at `end`; sooner where a rank is known not to come.
    fn run(&mut self, meeting: &Meeting, admissions: &Receiver<Admission>, mut end: Instant) -> Result<bool> {
        while let Some(missing) = (1..meeting.ranks).find(|&rank| !self.has_come(rank)) {
            let is_lost = meeting.is_numbered && !self.refused.is_empty();
            if is_lost && (missing..meeting.ranks).all(|rank| self.has_come(rank) || self.refused.contains_key(&rank)) {
                return Ok(false);
            }
            match admissions.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Admission::Failed(out)) => return Err(out),
                Ok(Admission::Rank(hello, stream)) => {
                    self.hosts[hello.rank] = hello.host;
                    // In the place of an earlier one, whose handshake stalled: then the rank tried again.
                    self.streams[hello.rank][hello.connection] = Some(stream);
                }
                Ok(Admission::OtherJob(rank, why)) => {
                    self.refused.insert(rank, why);
                    if meeting.is_numbered {
                        end = end.min(Instant::now() + LAST);
                    }
                }
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }

    fn arrivals(self) -> Vec<Arrival> {
        let whole = |(rank, (host, streams)): (usize, (String, [Option<TcpStream>; CONNECTIONS]))| {
            let [Some(a), Some(b), Some(c)] = streams else { return None };
            Some((rank, host, [a, b, c]))
        };
        self.hosts.into_iter().zip(self.streams).enumerate().filter_map(whole).collect()
    }

    /// Sends those away that have come, and says why the others have not.
    fn give_up(self, meeting: &Meeting, deadline: Duration) -> Error {
        let (here, missing): (Vec<_>, Vec<_>) = (1..meeting.ranks).partition(|&rank| self.has_come(rank));
        let refused: Vec<&str> = self.refused.values().map(String::as_str).collect();
        let is_lost = meeting.is_numbered && !refused.is_empty();
        let code = if is_lost { EXIT_USAGE } else { EXIT_RESTART };
        for rank in here {
            self.streams[rank][CONTROL].iter().for_each(|stream| control::send_away(stream, code));
        }
        if is_lost {
            return Error::Usage(refused.join("; "));
        }
        let Meeting { host, port, ranks, .. } = meeting;
        let (missing, seconds) = (list(&missing), deadline.as_secs_f64());
        let why = match refused[..] {
            [] => "were they started, and does a firewall let them through?".to_owned(),
            _ => format!("refused: {}", refused.join("; ")),
        };
        Error::Peer(format!("{missing} of {ranks} did not come to {host}, port {port}, within {seconds} s; {why}"))
    }
}

/// "rank 3" or "ranks 3, 5".
fn list(ranks: &[usize]) -> String {
    let numbers = ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    format!("rank{} {numbers}", if ranks.len() == 1 { "" } else { "s" })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::job::Job;
    use std::io::{Read, Write};

    /// RFC 6761: no name ends in .invalid.
    #[test]
    fn a_name_that_nobody_knows_is_told_by_rank_0() {
        let error = look_up("rank-0.invalid", 1, Duration::ZERO).unwrap_err();
        let wanted = "rank 0 cannot look up its own host, \"rank-0.invalid\" (";
        assert!(error.exit_code() == 2 && error.to_string().starts_with(wanted), "{error}");
        assert!(error.to_string().contains("set MASTER_ADDR to a name or an address"), "{error}");
        look_up("127.0.0.1", 1, Duration::ZERO).unwrap();
    }

    /// A rank whose handshake stalls gives up the connection and tries again, however far rank 0 had come with the first one.
    #[test]
    fn a_connection_takes_the_place_of_an_earlier_one_of_its_process() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let key = [7; 32];
        let job = Job::new(None);
        let host = "127.0.0.1".to_owned();
        let meeting = Meeting { rank: 0, ranks: 2, host, port, key, is_numbered: false, job: job.clone() };
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
