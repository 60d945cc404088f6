//! Small typed messages between ranks, over any communicator.

use super::Communicator;
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use serde::{Serialize, de::DeserializeOwned};

/// No message between ranks is larger than this.
const LIMIT: usize = 256 << 20;

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
