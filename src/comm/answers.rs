//! Collectives whose answer is known: a transport that computes wrongly is told before anything is trained with it.

use super::{Communicator, ReduceOp};
use crate::error::Result;
use candle_core::{Device, Tensor};

/// Numbers in the small and the large messages, as transports have other ways for large ones.
pub(super) const SMALL: usize = 7;
pub(super) const LARGE: usize = 1 << 18;

/// The first wrong number of this rank's, of every collective on about `length` numbers.
pub(super) fn wrong_answer(comm: &dyn Communicator, length: usize, device: &Device) -> Result<Option<String>> {
    let (rank, ranks, part) = (comm.rank(), comm.world_size(), length.div_ceil(comm.world_size()));
    let (length, root) = (part * ranks, ranks - 1);
    let tensor = |length: usize| -> Result<Tensor> {
        let values: Vec<f32> = (0..length).map(|i| value(rank, i)).collect();
        Ok(Tensor::from_vec(values, length, device)?)
    };
    let sum = |i: usize| (0..ranks).map(|rank| value(rank, i)).sum::<f32>();
    let (whole, shard) = (tensor(length)?, tensor(part)?);
    let wrong = [
        differs("broadcast", &comm.broadcast(&whole, root)?, |i| value(root, i))?,
        differs("all_reduce", &comm.all_reduce(&whole, ReduceOp::Sum)?, sum)?,
        differs("reduce_scatter", &comm.reduce_scatter(&whole, ReduceOp::Sum)?, |i| sum(rank * part + i))?,
        differs("all_gather", &comm.all_gather(&shard)?, |i| value(i / part, i % part))?,
    ];
    Ok(wrong.into_iter().flatten().next())
}

/// A small whole number: sums of them are exact in every order.
fn value(rank: usize, i: usize) -> f32 {
    ((rank + 1) * (i % 5 + 1)) as f32
}

fn differs(name: &str, found: &Tensor, expected: impl Fn(usize) -> f32) -> Result<Option<String>> {
    let found = found.to_vec1::<f32>()?;
    let wrong = found.iter().enumerate().find(|&(i, &found)| found != expected(i));
    let length = found.len();
    Ok(wrong.map(|(i, found)| format!("{name} of {length} numbers gives {found} for number {i}, not {}", expected(i))))
}
