//! What goes over a connection: a head that both ends must agree on, then the values it promises; every read and write
//! ends at a deadline. Nothing that was received says how much to allocate.

use crate::comm::{Call, transport::Element};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// The most that one read or write moves, so that its time limit can be set anew.
const PIECE: usize = 1 << 20;

/// Begins a message: the call, the size of an element, the call's number and the bytes that follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    call: u8,
    element: u8,
    /// The root of a broadcast, the operation of a reduction.
    detail: u32,
    number: u32,
    bytes: u64,
}

const HEAD: usize = 18;

impl Head {
    pub fn new<T: Element>(call: Call, number: u32) -> Self {
        let (call, detail) = match call {
            Call::Barrier => (1, 0),
            Call::Broadcast { root } => (2, root as u32),
            Call::AllReduce(op) => (3, op as u32),
            Call::AllGather => (4, 0),
            Call::ReduceScatter(op) => (5, op as u32),
        };
        Self { call, element: size_of::<T>() as u8, detail, number, bytes: 0 }
    }

    pub fn with_length<T: Element>(self, length: usize) -> Self {
        Self { bytes: (length * size_of::<T>()) as u64, ..self }
    }

    /// Of what `rank` sends to rank 0: in a broadcast only its root has anything to say.
    pub fn of_sender(self, call: Call, rank: usize, length: usize) -> Self {
        let length = match call {
            Call::Barrier => 0,
            Call::Broadcast { root } if root != rank => 0,
            _ => length,
        };
        Self { bytes: length as u64 * u64::from(self.element), ..self }
    }

    pub fn length<T: Element>(&self) -> usize {
        self.bytes as usize / size_of::<T>()
    }

    fn encode(&self) -> [u8; HEAD] {
        let mut out = [0; HEAD];
        out[..2].copy_from_slice(&[self.call, self.element]);
        out[2..6].copy_from_slice(&self.detail.to_le_bytes());
        out[6..10].copy_from_slice(&self.number.to_le_bytes());
        out[10..].copy_from_slice(&self.bytes.to_le_bytes());
        out
    }

    pub fn send<T: Element>(&self, stream: &TcpStream, values: &[T], end: Instant) -> Result<()> {
        let mut message = self.encode().to_vec();
        let bytes: &[u8] = bytemuck::cast_slice(values);
        // Small ones in one packet.
        let with_head = bytes.len().min(PIECE);
        message.extend_from_slice(&bytes[..with_head]);
        write(stream, &message, end)?;
        write(stream, &bytes[with_head..], end)
    }

    /// The values, if the other end sends what is expected.
    pub fn receive<T: Element>(&self, stream: &TcpStream, end: Instant) -> Result<Vec<T>> {
        let mut head = [0; HEAD];
        read(stream, &mut head, end)?;
        if head != self.encode() {
            let found = format!("sends {head:?} where {:?} is expected", self.encode());
            return Err(Error::new(ErrorKind::InvalidData, found));
        }
        let mut values = vec![T::default(); self.length::<T>()];
        read(stream, bytemuck::cast_slice_mut(&mut values), end)?;
        Ok(values)
    }
}

/// Whether the other end says what it must not.
pub(super) fn broken(error: &Error) -> bool {
    error.kind() == ErrorKind::InvalidData
}

/// Whether a read or write ended because its time was over.
pub(super) fn is_timeout(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
}

/// Whether nothing has come that is not read yet.
pub(super) fn is_silent(stream: &TcpStream) -> bool {
    let peeked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    stream.set_nonblocking(false).is_err() || peeked.is_err()
}

/// Fills `buffer`; [`ErrorKind::TimedOut`] at `end`, [`ErrorKind::UnexpectedEof`] where the other end is closed.
pub(super) fn read(mut stream: &TcpStream, mut buffer: &mut [u8], end: Instant) -> Result<()> {
    while !buffer.is_empty() {
        stream.set_read_timeout(Some(left(end)?))?;
        let piece = buffer.len().min(PIECE);
        match stream.read(&mut buffer[..piece]) {
            Ok(0) => return Err(Error::new(ErrorKind::UnexpectedEof, "closed by the other end")),
            Ok(count) => buffer = &mut buffer[count..],
            Err(e) if e.kind() == ErrorKind::Interrupted || is_timeout(&e) => (),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes all; [`ErrorKind::TimedOut`] at `end`.
pub(super) fn write(mut stream: &TcpStream, mut bytes: &[u8], end: Instant) -> Result<()> {
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(left(end)?))?;
        match stream.write(&bytes[..bytes.len().min(PIECE)]) {
            Ok(count) => bytes = &bytes[count..],
            Err(e) if e.kind() == ErrorKind::Interrupted || is_timeout(&e) => (),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Time until `end`.
fn left(end: Instant) -> Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(Error::new(ErrorKind::TimedOut, "nothing came in time")) } else { Ok(left) }
}
