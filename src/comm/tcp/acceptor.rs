//! Where rank 0 lets the others in, and tells strangers that they are none of them.

use super::handshake::{Handshake, Hello};
use super::{CONNECTIONS, descriptors};
use crate::comm::bootstrap::Meeting;
use crate::comm::watch::signed;
use crate::error::Error;
use crate::hostname::hostname;
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Strangers that are examined at once; further ones are sent away.
const HANDSHAKES: usize = 128;

/// Refused strangers that are told of.
const TOLD: usize = 8;

/// After an error of the listener it listens again after this.
const AGAIN: Duration = Duration::from_millis(250);

/// What comes in.
pub(super) enum Admission {
    /// A connection of a rank.
    Rank(Hello, TcpStream),
    /// A rank that was started for something else was refused; its number, and why.
    OtherJob(usize, String),
    /// Nothing can come in any more.
    Failed(Error),
}

/// Rank 0's side of all handshakes.
pub(super) struct Acceptor {
    meeting: Meeting,
    /// The process that is each rank, once it has come.
    processes: Mutex<Vec<Option<u64>>>,
    handshakes: AtomicUsize,
    refused: AtomicUsize,
    admissions: Mutex<Sender<Admission>>,
}

impl Acceptor {
    /// Of the ranks of a meeting.
    pub fn new(meeting: &Meeting, admissions: Sender<Admission>) -> Arc<Self> {
        Arc::new(Self {
            meeting: meeting.clone(),
            processes: Mutex::new(vec![None; meeting.ranks]),
            handshakes: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            admissions: Mutex::new(admissions),
        })
    }

    /// Takes connections one by one, each examined on a thread of its own, so that a slow one holds up nobody.
    pub fn listen(self: &Arc<Self>, listener: &TcpListener) {
        for stream in listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(e) => {
                    self.end_if_out(&e);
                    std::thread::sleep(AGAIN);
                    continue;
                }
            };
            if self.handshakes.fetch_add(1, Ordering::SeqCst) >= HANDSHAKES {
                self.handshakes.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let its = self.clone();
            let examine = move || {
                its.examine(stream);
                its.handshakes.fetch_sub(1, Ordering::SeqCst);
            };
            if let Err(e) = std::thread::Builder::new().name("handshake".into()).spawn(examine) {
                self.handshakes.fetch_sub(1, Ordering::SeqCst);
                self.send(Admission::Failed(Error::Failed(format!(
                    "the thread of a new connection could not be started: {e}; let this user have more threads \
                     (ulimit -u)"
                ))));
            }
        }
    }

    fn examine(&self, stream: TcpStream) {
        let address = match stream.peer_addr() {
            Ok(address) => address.ip().to_string(),
            Err(_) => "an unknown address".into(),
        };
        if let Err(e) = self.admit(stream) {
            if self.refused.fetch_add(1, Ordering::SeqCst) < TOLD {
                eprintln!("{}", signed(&format!("refused a connection from {address}: {e}")));
            }
            self.end_if_out(&e);
        }
    }

    fn admit(&self, stream: TcpStream) -> std::io::Result<()> {
        let key = &self.meeting.key;
        let handshake = Handshake::examine(stream, key)?;
        let hello = handshake.hello.clone();
        let other_job = self.other_job(&hello);
        if let Some(why) = other_job.clone().or_else(|| self.no_place(&hello)) {
            handshake.refuse(key, &why)?;
            if other_job.is_some() && (1..self.meeting.ranks).contains(&hello.rank) {
                self.send(Admission::OtherJob(hello.rank, why.clone()));
            }
            return Err(std::io::Error::new(ErrorKind::PermissionDenied, why));
        }
        let stream = handshake.admit(key)?;
        self.send(Admission::Rank(hello, stream));
        Ok(())
    }

    /// Nobody waits for it any more where the deadline has passed.
    fn send(&self, admission: Admission) {
        let _ = self.admissions.lock().unwrap_or_else(PoisonError::into_inner).send(admission);
    }

    /// Ends the rendezvous where an error is of the kind that comes again with the next connection.
    fn end_if_out(&self, error: &std::io::Error) {
        if descriptors::are_out(error) {
            self.send(Admission::Failed(descriptors::out(error)));
        }
    }

    /// Why this one is of another job, if it is.
    fn other_job(&self, hello: &Hello) -> Option<String> {
        let (Hello { rank, host, job, .. }, ours) = (hello, &self.meeting.job);
        if ours.includes(job) {
            return None;
        }
        Some(match self.meeting.is_numbered {
            true => format!(
                "rank {rank} on {host} was started with another command and another configuration ({job}) than rank 0 \
                 on {} ({ours}): start all ranks with the same command",
                hostname()
            ),
            false => format!(
                "rank {rank} on {host} is of another job ({job}) than rank 0 ({ours}): give each job a MASTER_PORT of \
                 its own, and all ranks of one the same command"
            ),
        })
    }

    /// Why there is no place for this one, if there is none.
    fn no_place(&self, hello: &Hello) -> Option<String> {
        let Hello { rank, ranks, connection, host, process, .. } = hello;
        let ours = self.meeting.ranks;
        if *ranks != ours {
            return Some(format!("rank {rank} on {host} was started as one of {ranks} ranks, rank 0 as one of {ours}"));
        }
        if *rank == 0 || *rank >= ours || *connection >= CONNECTIONS {
            return Some(format!(
                "there is no place for rank {rank} of {ranks} on {host}: two processes were given one rank"
            ));
        }
        let mut processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        let is_second = processes[*rank].get_or_insert(*process) != process;
        is_second.then(|| format!("rank {rank} is here already; the one on {host} is a second one"))
    }
}
