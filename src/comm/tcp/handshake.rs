//! How two ends of a connection prove to each other that they belong to one job, before either believes a word.
//!
//! Rank 0 sends a random challenge; a rank answers with a challenge of its own, who it is, and a code over all of it that
//! only the key's owner can make (keyed BLAKE3); rank 0 answers with its verdict and a code likewise. The key never
//! travels, every part has a fixed size or a small limit, and all of it has one time limit.

use super::wire;
use crate::comm::bootstrap::random;
use crate::comm::job::Job;
use std::io::{Error, ErrorKind, Result};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// The whole handshake may take this long.
pub(super) const LIMIT: Duration = Duration::from_secs(10);

/// Says which protocol this is, and that bytes of numbers have the same order on both ends.
const MAGIC: [u8; 12] = {
    let (name, order) = (b"flowrl 3", 0x0102_0304_u32.to_ne_bytes());
    [name[0], name[1], name[2], name[3], name[4], name[5], name[6], name[7], order[0], order[1], order[2], order[3]]
};

/// No hello and no verdict is longer.
const LONGEST: usize = 1024;

/// Who connects.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Hello {
    pub rank: usize,
    pub ranks: usize,
    /// Which of the rank's connections this is.
    pub connection: usize,
    pub host: String,
    /// A number of the rank's process: another one of the same rank is none of us.
    pub process: u64,
    /// What it was started for.
    pub job: Job,
}

/// A code over `parts` that only the owner of the key can make. Comparing two takes the same time whatever differs.
fn code(key: &[u8; 32], parts: [&[u8]; 4]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(key);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hasher.finalize()
}

fn refused(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::PermissionDenied, message.into())
}

fn send_text(stream: &TcpStream, text: &[u8], end: Instant) -> Result<()> {
    wire::write(stream, &(text.len() as u16).to_le_bytes(), end)?;
    wire::write(stream, text, end)
}

fn receive_text(stream: &TcpStream, end: Instant) -> Result<Vec<u8>> {
    let mut length = [0; 2];
    wire::read(stream, &mut length, end)?;
    let length = usize::from(u16::from_le_bytes(length));
    if length > LONGEST {
        return Err(refused(format!("a message of {length} bytes where {LONGEST} is the most")));
    }
    let mut text = vec![0; length];
    wire::read(stream, &mut text, end)?;
    Ok(text)
}

/// A stranger's answer to our challenge.
pub(super) struct Handshake {
    stream: TcpStream,
    challenge: [u8; 32],
    end: Instant,
    pub hello: Hello,
}

impl Handshake {
    /// Rank 0: who is there? Nothing is decoded before its code is right.
    ///
    /// # Errors
    /// Why it is no rank of this job.
    pub fn examine(stream: TcpStream, key: &[u8; 32]) -> Result<Self> {
        let end = Instant::now() + LIMIT;
        stream.set_nodelay(true)?;
        let ours = random()?;
        wire::write(&stream, &[&MAGIC[..], &ours].concat(), end)?;
        let mut magic = [0; MAGIC.len()];
        wire::read(&stream, &mut magic, end)?;
        if magic != MAGIC {
            return Err(refused("it does not speak this program's protocol"));
        }
        let (mut theirs, mut claimed) = ([0; 32], [0; 32]);
        wire::read(&stream, &mut theirs, end)?;
        wire::read(&stream, &mut claimed, end)?;
        let hello = receive_text(&stream, end)?;
        if code(key, [b"rank", &ours, &theirs, &hello]) != blake3::Hash::from_bytes(claimed) {
            let why = "it does not know this job's token (FLOWRL_TOKEN), or is of an earlier start of the job";
            // Its own code would be a code for strangers: this one is for nobody. It may be gone without waiting for it.
            let _ = answer(&stream, &theirs, &[0; 32], why, end);
            return Err(refused(why));
        }
        let decoded = bincode::serde::decode_from_slice(&hello, bincode::config::standard().with_limit::<LONGEST>());
        let (hello, _) = decoded.map_err(|e| refused(format!("it cannot be understood: {e}")))?;
        Ok(Self { stream, challenge: theirs, end, hello })
    }

    pub fn refuse(self, key: &[u8; 32], why: &str) -> Result<()> {
        answer(&self.stream, &self.challenge, key, why, self.end)
    }

    pub fn admit(self, key: &[u8; 32]) -> Result<TcpStream> {
        answer(&self.stream, &self.challenge, key, "", self.end)?;
        Ok(self.stream)
    }
}

/// "" lets it in.
fn answer(stream: &TcpStream, challenge: &[u8; 32], key: &[u8; 32], verdict: &str, end: Instant) -> Result<()> {
    let code = code(key, [b"root", challenge, verdict.as_bytes(), b""]);
    wire::write(stream, code.as_bytes(), end)?;
    send_text(stream, verdict.as_bytes(), end)
}

/// Another rank: presents itself to rank 0.
///
/// # Errors
/// [`ErrorKind::PermissionDenied`] with the reason where it is not let in, or the other end is not rank 0 of this job.
pub(super) fn present(stream: &TcpStream, key: &[u8; 32], hello: &Hello) -> Result<()> {
    let end = Instant::now() + LIMIT;
    stream.set_nodelay(true)?;
    let mut magic = [0; MAGIC.len()];
    wire::read(stream, &mut magic, end)?;
    if magic != MAGIC {
        return Err(refused("another program listens there; set MASTER_PORT to a free port, the same on all ranks"));
    }
    let mut theirs = [0; 32];
    wire::read(stream, &mut theirs, end)?;
    let ours = random()?;
    let hello = bincode::serde::encode_to_vec(hello, bincode::config::standard()).map_err(Error::other)?;
    let proof = code(key, [b"rank", &theirs, &ours, &hello]);
    wire::write(stream, &[&MAGIC[..], &ours, proof.as_bytes()].concat(), end)?;
    send_text(stream, &hello, end)?;
    let mut claimed = [0; 32];
    wire::read(stream, &mut claimed, end)?;
    let verdict = receive_text(stream, end)?;
    let genuine = code(key, [b"root", &ours, &verdict, b""]) == blake3::Hash::from_bytes(claimed);
    match (genuine, String::from_utf8_lossy(&verdict)) {
        (true, verdict) if verdict.is_empty() => Ok(()),
        (true, verdict) => Err(refused(verdict)),
        (false, _) => Err(refused("it is of another job, or FLOWRL_TOKEN is not the same on all ranks")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    const KEY: [u8; 32] = [7; 32];

    fn hello() -> Hello {
        Hello { rank: 1, ranks: 2, connection: 0, host: "n2".into(), process: 3, job: Job::new(None) }
    }

    /// Rank 0's view of a stranger that does `act`.
    fn examined(act: impl FnOnce(TcpStream) + Send) -> Result<Hello> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || act(TcpStream::connect(address).unwrap()));
            let handshake = Handshake::examine(listener.accept().unwrap().0, &KEY)?;
            let hello = handshake.hello.clone();
            handshake.admit(&KEY)?;
            Ok(hello)
        })
    }

    #[test]
    fn ranks_of_a_job_know_each_other() {
        let found = examined(|stream| present(&stream, &KEY, &hello()).unwrap()).unwrap();
        assert_eq!(found, hello());
    }

    #[test]
    fn a_stranger_is_told_apart() {
        let another = examined(|stream| {
            let refused = present(&stream, &[8; 32], &hello()).unwrap_err().to_string();
            assert!(refused.contains("FLOWRL_TOKEN"), "{refused}");
        });
        assert!(another.unwrap_err().to_string().contains("does not know this job's token"));
        let browser = examined(|mut stream| {
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        assert!(browser.unwrap_err().to_string().contains("protocol"));
        let short = examined(|mut stream| stream.write_all(&MAGIC[..5]).unwrap()).unwrap_err();
        // Closing with our challenge unread resets the connection.
        assert!([ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset].contains(&short.kind()), "{short}");
        let huge = examined(|mut stream| {
            stream.write_all(&[&MAGIC[..], &[0; 64], &[0xff, 0xff]].concat()).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        assert!(huge.unwrap_err().to_string().contains("65535 bytes"));
    }

    /// What was overheard proves nothing in another connection.
    #[test]
    fn an_answer_cannot_be_used_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let overheard = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&[&MAGIC[..], &[1; 32]].concat()).unwrap();
            let mut heard = vec![0; MAGIC.len() + 64];
            stream.read_exact(&mut heard).unwrap();
            heard.extend(
                receive_text(&stream, Instant::now() + LIMIT)
                    .map(|t| [&(t.len() as u16).to_le_bytes()[..], &t].concat())
                    .unwrap(),
            );
            heard
        });
        assert!(present(&TcpStream::connect(address).unwrap(), &KEY, &hello()).is_err());
        let heard = overheard.join().unwrap();
        let again = examined(move |mut stream| {
            stream.write_all(&heard).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        assert!(again.unwrap_err().to_string().contains("does not know this job's token"));
    }

    #[test]
    fn rank_0_is_told_apart_from_an_impostor() {
        for answer in [
            b"SSH-2.0-OpenSSH_9.2 and so on, to the end of the line......".to_vec(),
            [&MAGIC[..], &[1; 32], &[0; 32], &[0, 0]].concat(),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let impostor = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(&answer).unwrap();
                let _ = stream.read_to_end(&mut Vec::new());
            });
            let refused = present(&TcpStream::connect(address).unwrap(), &KEY, &hello()).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{refused}");
            impostor.join().unwrap();
        }
    }
}
