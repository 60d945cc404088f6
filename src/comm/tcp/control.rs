//! A connection beside the collectives: signs of life, the word that ends the job, and the farewell.
//!
//! A rank that is gone is noticed at once, whatever the others are doing, one whose host or network is gone after
//! [`SILENCE`]; and the exit code of the rank that failed becomes that of all.

use super::Peer;
use super::wire;
use crate::comm::watch;
use crate::error::{EXIT_RESTART, EXIT_USAGE, Error, Result, failing};
use std::io::ErrorKind;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// A peer that is silent this long is lost, or shorter where the collectives' deadline is.
const SILENCE: Duration = Duration::from_secs(60);

/// Waits in a silence. Only waits without a word count, so that ranks that were all stopped and go on, as a batch system
/// may do with a job, do not take each other for lost.
const WAITS: u32 = 4;

/// Words are small: they wait for nobody.
const WRITING: Duration = Duration::from_secs(1);

/// The length of a message.
const LENGTH: usize = 5;

/// What is said on the control connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ControlMessage {
    /// This rank lives.
    Heartbeat,
    /// All ranks are there.
    Begin,
    /// End, with this exit code.
    Abort(i32),
    /// This rank is done; said by rank 0, all are.
    Farewell,
}

impl ControlMessage {
    fn encode(self) -> [u8; LENGTH] {
        let (kind, code) = match self {
            ControlMessage::Heartbeat => (1, 0),
            ControlMessage::Begin => (2, 0),
            ControlMessage::Abort(code) => (3, code),
            ControlMessage::Farewell => (4, 0),
        };
        let [a, b, c, d] = i32::to_le_bytes(code);
        [kind, a, b, c, d]
    }

    fn decode([kind, code @ ..]: [u8; LENGTH]) -> Option<Self> {
        match kind {
            1 => Some(ControlMessage::Heartbeat),
            2 => Some(ControlMessage::Begin),
            // A word that the job is done is Farewell's.
            3 => Some(ControlMessage::Abort(failing(i32::from_le_bytes(code)))),
            4 => Some(ControlMessage::Farewell),
            _ => None,
        }
    }

    /// The next one of this connection.
    fn receive(stream: &TcpStream, end: Instant) -> std::io::Result<Self> {
        let mut bytes = [0; LENGTH];
        wire::read(stream, &mut bytes, end)?;
        Self::decode(bytes).ok_or_else(|| std::io::Error::new(ErrorKind::InvalidData, "an unknown word"))
    }

    fn send(self, stream: &TcpStream) -> std::io::Result<()> {
        wire::write(stream, &self.encode(), Instant::now() + WRITING)
    }
}

/// Tells a rank that the others do not all come, and which exit code that gives.
pub(super) fn send_away(stream: &TcpStream, code: i32) {
    let _ = ControlMessage::Abort(code).send(stream);
}

/// The control connections of this rank.
pub(super) struct Control {
    rank: usize,
    /// Words must not mix.
    peers: Vec<Mutex<Peer>>,
    names: Vec<String>,
    departed: Mutex<usize>,
    changed: Condvar,
}

/// A global because those who end the job, the panic hook and the watchdog, hold no world.
static CONTROL: OnceLock<Arc<Control>> = OnceLock::new();

/// Whether this process is ending: the first reason is the one that is told.
static ENDING: AtomicBool = AtomicBool::new(false);

impl Control {
    /// Waits until rank 0 says that all have come, and keeps the connections from then on.
    pub fn start(rank: usize, peers: Vec<Peer>, deadline: Duration) -> Result<Arc<Self>> {
        let end = Instant::now() + deadline;
        for peer in &peers {
            if rank == 0 {
                ControlMessage::Begin
                    .send(&peer.stream)
                    .map_err(|e| Error::Peer(format!("{peer} is lost already: {e}")))?;
            } else {
                begun(&peer.stream, end)?;
            }
        }
        let reading = peers.iter().map(|peer| peer.stream.try_clone()).collect::<std::io::Result<Vec<_>>>();
        let failed = |e| Error::Failed(format!("the control connection could not be kept: {e}"));
        let reading = reading.map_err(failed)?;
        let names = peers.iter().map(Peer::to_string).collect();
        let peers = peers.into_iter().map(Mutex::new).collect();
        let control = Arc::new(Self { rank, peers, names, departed: Mutex::new(0), changed: Condvar::new() });
        if CONTROL.set(control.clone()).is_err() {
            return Err(Error::Failed("the ranks of this process have met already".into()));
        }
        let wait = deadline.min(SILENCE) / WAITS;
        for (i, stream) in reading.into_iter().enumerate() {
            let control = control.clone();
            let listen = move || control.listen(i, &stream, wait);
            std::thread::Builder::new().name("control".into()).spawn(listen).map_err(failed)?;
        }
        let its = control.clone();
        let live = move || its.live(wait / 2);
        std::thread::Builder::new().name("alive".into()).spawn(live).map_err(failed)?;
        Ok(control)
    }

    /// Says the word to all; those that are gone do not hear it.
    fn say(&self, word: ControlMessage) {
        for peer in &self.peers {
            let _ = word.send(&peer.lock().unwrap_or_else(PoisonError::into_inner).stream);
        }
    }

    fn live(&self, every: Duration) {
        loop {
            std::thread::sleep(every);
            self.say(ControlMessage::Heartbeat);
        }
    }

    /// Hears one peer until it says farewell.
    fn listen(&self, peer: usize, stream: &TcpStream, wait: Duration) {
        let mut silent = 0;
        let name = &self.names[peer];
        while !self.has_parted(stream, wait, &mut silent, name) {}
        *self.departed.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_all();
    }

    /// Whether the next word is the last.
    fn has_parted(&self, stream: &TcpStream, wait: Duration, silent: &mut u32, name: &str) -> bool {
        match ControlMessage::receive(stream, Instant::now() + wait) {
            Ok(ControlMessage::Farewell) => return true,
            Ok(ControlMessage::Abort(code)) => {
                end(code, &format!("{name} ended the job with exit code {code}"), |code| {
                    if self.rank == 0 {
                        self.say(ControlMessage::Abort(code));
                    }
                })
            }
            Ok(ControlMessage::Heartbeat | ControlMessage::Begin) => *silent = 0,
            Err(e) if wire::is_timeout(&e) => {
                *silent += 1;
                if *silent == WAITS {
                    let seconds = (wait * WAITS).as_secs_f64();
                    self.lost(&format!(
                        "nothing was heard of {name} for {seconds} s: it hangs, or its host or the network is down"
                    ));
                }
            }
            Err(e) if e.kind() == ErrorKind::InvalidData => self.lost(&format!("{name} says {e}")),
            Err(e) => self.lost(&format!("{name} is gone: {e}")),
        }
        false
    }

    fn lost(&self, message: &str) -> ! {
        let message = format!("{message}. Start the run again: it resumes from the newest complete checkpoint");
        end(EXIT_RESTART, &message, |code| self.say(ControlMessage::Abort(code)))
    }

    /// The end that all agree on: rank 0 waits for all, the others for rank 0.
    pub fn part(&self) {
        if self.rank != 0 {
            self.say(ControlMessage::Farewell);
        }
        let mut departed = self.departed.lock().unwrap_or_else(PoisonError::into_inner);
        while *departed < self.peers.len() {
            departed = self.changed.wait(departed).unwrap_or_else(PoisonError::into_inner);
        }
        if self.rank == 0 {
            self.say(ControlMessage::Farewell);
        }
    }
}

/// Waits for rank 0's word that all have come.
fn begun(stream: &TcpStream, end: Instant) -> Result<()> {
    let words = |what: &str| format!("rank 0 did not begin: {what}");
    let lost = |what: String| Err(Error::Peer(words(&what)));
    match ControlMessage::receive(stream, end + super::PATIENCE) {
        Ok(ControlMessage::Begin) => Ok(()),
        Ok(ControlMessage::Abort(EXIT_USAGE)) => {
            Err(Error::Usage(words("ranks were started differently; see its message")))
        }
        Ok(ControlMessage::Abort(_)) => lost("not all ranks came; see its message".into()),
        Ok(word) => lost(format!("it says {word:?}")),
        Err(e) => lost(e.to_string()),
    }
}

/// Ends this process with the message, after `tell`, unless another thread does so already.
fn end(code: i32, message: &str, tell: impl FnOnce(i32)) -> ! {
    while ENDING.swap(true, Ordering::SeqCst) {
        std::thread::sleep(WRITING);
    }
    eprintln!("{}", watch::signed(message));
    tell(code);
    signal_hook::low_level::exit(code)
}

/// Whether ranks have met over TCP.
#[cfg(all(feature = "mpi", feature = "cuda"))]
pub(crate) fn joined() -> bool {
    CONTROL.get().is_some()
}

/// Ends all ranks. May be called on any thread at any time.
pub(crate) fn abort(code: i32) -> ! {
    let code = failing(code);
    if ENDING.swap(true, Ordering::SeqCst) {
        // Another thread has a reason, and ends this process in a moment.
        std::thread::sleep(2 * WRITING);
    } else if let Some(control) = CONTROL.get() {
        control.say(ControlMessage::Abort(code));
    }
    signal_hook::low_level::exit(code)
}
