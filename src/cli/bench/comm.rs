//! Bandwidth of the collectives.

use crate::comm::{Call, Communicator, ReduceOp, World};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use std::time::Instant;

/// The collectives that carry gradients and parameters.
const CALLS: [(&str, Call); 3] = [
    ("all-reduce", Call::AllReduce(ReduceOp::Sum)),
    ("reduce-scatter", Call::ReduceScatter(ReduceOp::Sum)),
    ("all-gather", Call::AllGather),
];

/// A table: for messages of up to `most` bytes on the device plane, what a rank sends in a ring of R ranks over the median
/// time, GB a second; and beside it a bare copy of the same bytes in memory, which no transport within a host can beat.
pub(super) fn measure(world: &World, most: usize) -> Result<String> {
    let comm = &*world.device;
    let ranks = comm.world_size();
    let mut table = format!("{}; GB/s that a rank sends (microseconds)\n{:>12}", world.describe(), "bytes");
    CALLS.iter().for_each(|(name, _)| table += &format!("  {name:>22}"));
    table += &format!("  {:>22}\n", "copy in memory");
    let mut bytes = 4 << 10;
    while bytes <= most.max(4 << 10) {
        let elements = (bytes / 4).next_multiple_of(ranks);
        table += &format!("{:>12}", 4 * elements);
        for (_, call) in CALLS {
            let (len, shares) = match call {
                Call::AllReduce(_) => (elements, 2),
                Call::AllGather => (elements / ranks, 1),
                _ => (elements, 1),
            };
            let tensor = Tensor::ones(len, DType::F32, &Device::Cpu)?;
            let time = median(bytes, comm, || comm.call(call, &tensor).map(drop))?;
            table += &cell(shares * (ranks - 1) * (4 * elements / ranks), time);
        }
        let tensor = Tensor::ones(elements, DType::F32, &Device::Cpu)?;
        let time = median(bytes, comm, || Ok(tensor.copy().map(drop)?))?;
        table += &cell(4 * elements, time);
        table.push('\n');
        bytes *= 8;
    }
    Ok(table)
}

/// Seconds of `work`, the median of as many calls as make about 256 MiB, 5 at least; all ranks begin together.
fn median(bytes: usize, comm: &dyn Communicator, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let calls = ((256 << 20) / bytes).clamp(5, 50);
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls + 1 {
        comm.barrier()?;
        let since = Instant::now();
        work()?;
        times.push(since.elapsed().as_secs_f64());
    }
    times.remove(0); // the first one touches new memory
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn cell(bytes: usize, seconds: f64) -> String {
    format!("  {:>22}", format!("{:.2} ({:.0})", bytes as f64 / seconds / 1e9, seconds * 1e6))
}
