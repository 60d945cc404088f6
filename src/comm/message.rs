//! Small typed messages between ranks, over any communicator.

use super::Communicator;
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use serde::{Serialize, de::DeserializeOwned};

/// No message between ranks is larger than this.
const LIMIT: usize = 256 << 20;

/// This rank's value, if every rank has one: what is not finite on one rank is so on all, and a reward that one rank cannot
/// have fails on all, with the first such rank's words. So all leave the iteration out, or save and stop, together.
///
/// # Errors
/// [`Error::NotFinite`] and [`Error::Reward`] as said; any other error of this rank is its own.
pub fn agreed<T>(mine: Result<T>, comm: &dyn Communicator) -> Result<T> {
    type Shared = Option<(Option<String>, String)>;
    let shared: Shared = match &mine {
        Err(Error::NotFinite(what)) => Some((None, what.clone())),
        Err(Error::Reward { name, message }) => Some((Some(name.clone()), message.clone())),
        _ => None,
    };
    match (exchange(comm, &shared)?.into_iter().flatten().next(), mine) {
        (Some((None, what)), Ok(_) | Err(Error::NotFinite(_) | Error::Reward { .. })) => Err(Error::NotFinite(what)),
        (Some((Some(name), message)), Ok(_) | Err(Error::NotFinite(_) | Error::Reward { .. })) => {
            Err(Error::Reward { name, message })
        }
        (_, mine) => mine,
    }
}

/// Every rank's value, in rank order, on every rank.
///
/// Values may differ in size: lengths are gathered first, then the encodings padded to the longest. Encoded by bincode,
/// between ranks of one run only, never on disk.
pub fn exchange<T: Serialize + DeserializeOwned>(comm: &dyn Communicator, value: &T) -> Result<Vec<T>> {
    let config = bincode::config::standard().with_limit::<LIMIT>();
    let failed = |what: &str, e: &dyn std::fmt::Display| Error::Failed(format!("a message between ranks {what}: {e}"));
    let mut bytes = bincode::serde::encode_to_vec(value, config).map_err(|e| failed("could not be encoded", &e))?;
    let lengths = comm.all_gather(&Tensor::new(&[bytes.len() as u32], &Device::Cpu)?)?.to_vec1::<u32>()?; // [R]
    let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
    bytes.resize(longest, 0);
    let all = comm.all_gather(&Tensor::from_vec(bytes, longest, &Device::Cpu)?)?.to_vec1::<u8>()?; // [R * longest]
    lengths
        .iter()
        .enumerate()
        .map(|(rank, &length)| {
            let part = &all[rank * longest..rank * longest + length as usize];
            bincode::serde::decode_from_slice(part, config)
                .map(|(value, _)| value)
                .map_err(|e| failed(&format!("from rank {rank} could not be read"), &e))
        })
        .collect()
}
