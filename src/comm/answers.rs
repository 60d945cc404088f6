//! Collectives whose answer is known: a transport that computes wrongly is told before anything is trained with it.

use super::plane::{DEVICE, HOST};
use super::{Communicator, ReduceOp, World, exchange};
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};

/// Numbers in the small and the large messages, as transports have other ways for large ones.
const SMALL: usize = 7;
const LARGE: usize = 1 << 18;

/// Checks the host plane, whose messages are small. Collective, the same answer on every rank.
///
/// # Errors
/// [`Error::Failed`] that names the collective, the plane, the rank and its host.
pub fn host_plane_answers(world: &World) -> Result<()> {
    check(world, &*world.host, HOST, &[SMALL], &Device::Cpu)
}

/// Checks the device plane on tensors of `device`. Collective, the same answer on every rank.
///
/// # Errors
/// As [`host_plane_answers`].
pub(super) fn device_plane_answers(world: &World, device: &Device) -> Result<()> {
    check(world, &*world.device, DEVICE, &[SMALL, LARGE], device)
}

fn check(world: &World, comm: &dyn Communicator, plane: &str, lengths: &[usize], device: &Device) -> Result<()> {
    let mut mine = None;
    for &length in lengths {
        let wrong = wrong_answer(comm, length, device)?;
        mine = mine.or(wrong);
    }
    let all = exchange(&*world.host, &(mine, world.hostname().to_string()))?;
    for (rank, (wrong, host)) in all.iter().enumerate() {
        if let Some(wrong) = wrong {
            return Err(Error::Failed(format!(
                "the {plane} plane computes wrongly on rank {rank} on {host}: {wrong}. The transport is broken there ({})",
                world.describe()
            )));
        }
    }
    Ok(())
}

/// The first wrong number of this rank's, of every collective on about `length` numbers.
fn wrong_answer(comm: &dyn Communicator, length: usize, device: &Device) -> Result<Option<String>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Call, ThreadGroup};
    use std::rc::Rc;

    /// Rank 1's results of one kind of call are off by one in the last number, where they are long.
    struct Wrong(Rc<dyn Communicator>, &'static str);

    impl Communicator for Wrong {
        fn rank(&self) -> usize {
            self.0.rank()
        }
        fn world_size(&self) -> usize {
            self.0.world_size()
        }
        fn call(&self, call: Call, tensor: &Tensor) -> Result<Tensor> {
            let result = self.0.call(call, tensor)?;
            if self.rank() != 1 || call.name() != self.1 || result.elem_count() < 1000 {
                return Ok(result);
            }
            let mut values = result.to_vec1::<f32>()?;
            values.last_mut().into_iter().for_each(|value| *value += 1.0);
            Ok(Tensor::new(values, &Device::Cpu)?)
        }
        fn abort(&self, code: i32) -> ! {
            self.0.abort(code)
        }
    }

    #[test]
    fn a_wrong_answer_of_any_collective_is_told_with_its_rank() {
        let with = |wrong: &'static str| {
            ThreadGroup::run(3, |mut world| {
                host_plane_answers(&world)?;
                world.device = Rc::new(Wrong(world.device.clone(), wrong));
                device_plane_answers(&world, &Device::Cpu)
            })
        };
        with("nothing").unwrap();
        for name in ["broadcast", "all_reduce", "reduce_scatter", "all_gather"] {
            let message = with(name).unwrap_err().to_string();
            let begins = "the device plane computes wrongly on rank 1 on ";
            assert!(message.starts_with(begins) && message.contains(&format!(": {name} of ")), "{message}");
        }
    }
}
