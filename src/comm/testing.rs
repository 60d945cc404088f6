//! The one suite that every communicator passes, whatever it is made of: run by the tests of each transport.

use super::{Call, Communicator, ReduceOp, exchange};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use half::bf16;

/// Lengths per rank: nothing, one, odd, a power of two, more than one cache line and not a multiple of anything.
const LENGTHS: [usize; 6] = [0, 1, 7, 64, 1024, 1031];

/// The types that travel.
const TYPES: [DType; 5] = [DType::F32, DType::BF16, DType::F64, DType::U32, DType::U8];

/// Checks every collective on every type and length, for up to 8 ranks; the values are exact in all types.
///
/// # Errors
/// [`Error::Failed`] that names the collective, type and length whose result is wrong.
pub fn conformance(comm: &dyn Communicator) -> Result<()> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    ensure(rank < ranks && ranks <= 8, || format!("rank {rank} of {ranks}, for a suite of at most 8 ranks"))?;
    comm.barrier()?;
    for dtype in TYPES {
        for length in LENGTHS {
            moves(comm, dtype, length)?;
            reductions(comm, dtype, length)?;
        }
    }
    rounding(comm)?;
    same_bits(comm)?;
    not_a_number(comm)?;
    results_are_owned(comm)?;
    begun(comm)?;
    messages(comm)?;
    mistakes(comm)?;
    comm.barrier()
}

/// Values of a rank: small whole numbers that differ between ranks and between neighbours.
fn values(rank: usize, range: std::ops::Range<usize>) -> Vec<f64> {
    range.map(|i| ((rank + 1) * (i % 7 + 1)) as f64).collect()
}

fn tensor(values: Vec<f64>, dtype: DType) -> Result<Tensor> {
    let length = values.len();
    Ok(Tensor::from_vec(values, length, &Device::Cpu)?.to_dtype(dtype)?)
}

fn moves(comm: &dyn Communicator, dtype: DType, length: usize) -> Result<()> {
    let mine = tensor(values(comm.rank(), 0..length), dtype)?;
    let all = (0..comm.world_size()).flat_map(|rank| values(rank, 0..length)).collect();
    expect("all_gather", &comm.all_gather(&mine)?, dtype, all)?;
    for root in 0..comm.world_size() {
        expect("broadcast", &comm.broadcast(&mine, root)?, dtype, values(root, 0..length))?;
    }
    Ok(())
}

fn reductions(comm: &dyn Communicator, dtype: DType, length: usize) -> Result<()> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    for op in [ReduceOp::Sum, ReduceOp::Max] {
        let reduced = |range: std::ops::Range<usize>| {
            let factor = match op {
                ReduceOp::Sum => (1..=ranks).sum::<usize>(),
                ReduceOp::Max => ranks,
            };
            values(0, range).into_iter().map(|v| v * factor as f64).collect()
        };
        let mine = tensor(values(rank, 0..length), dtype)?;
        expect("all_reduce", &comm.all_reduce(&mine, op)?, dtype, reduced(0..length))?;
        let mine = tensor(values(rank, 0..ranks * length), dtype)?;
        let part = rank * length..(rank + 1) * length;
        expect("reduce_scatter", &comm.reduce_scatter(&mine, op)?, dtype, reduced(part))?;
    }
    Ok(())
}

/// 256 + 1 + 1 + ... stays 256 where each sum is rounded to bf16.
fn rounding(comm: &dyn Communicator) -> Result<()> {
    let ranks = comm.world_size();
    let mine = if comm.rank() == 0 { 256.0 } else { 1.0 };
    let expected = f64::from(bf16::from_f64(256.0 + (ranks - 1) as f64));
    let sum = comm.all_reduce(&tensor(vec![mine; 3], DType::BF16)?, ReduceOp::Sum)?;
    expect("all_reduce rounded once", &sum, DType::BF16, vec![expected; 3])?;
    let sum = comm.reduce_scatter(&tensor(vec![mine; 3 * ranks], DType::BF16)?, ReduceOp::Sum)?;
    expect("reduce_scatter rounded once", &sum, DType::BF16, vec![expected; 3])
}

/// A sum whose rounding depends on the order is still the same on every rank.
fn same_bits(comm: &dyn Communicator) -> Result<()> {
    let mine = (0..1031).map(|i| ((comm.rank() * 1031 + i) as f64 * 0.7).sin() * 1e3).collect();
    let sum = comm.all_reduce(&tensor(mine, DType::F32)?, ReduceOp::Sum)?;
    let bits = sum.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let all = exchange(comm, &bits)?;
    ensure(all.iter().all(|other| *other == bits), || "all_reduce gives ranks different bits".into())
}

/// A NaN of one rank reaches all, by sum and by maximum, and infinities and negative numbers are ordered.
fn not_a_number(comm: &dyn Communicator) -> Result<()> {
    let last = comm.rank() + 1 == comm.world_size();
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let mine = vec![if last { f64::NAN } else { f64::INFINITY }, -1.0 - comm.rank() as f64, f64::NEG_INFINITY];
        for op in [ReduceOp::Sum, ReduceOp::Max] {
            let joined = comm.all_reduce(&tensor(mine.clone(), dtype)?, op)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            ensure(joined[0].is_nan(), || format!("all_reduce {op:?} of {dtype:?} loses a NaN: {joined:?}"))?;
            let ordered = op == ReduceOp::Sum || (joined[1] == -1.0 && joined[2] == f64::NEG_INFINITY);
            ensure(ordered, || format!("all_reduce {op:?} of {dtype:?} is not ordered: {joined:?}"))?;
        }
    }
    Ok(())
}

/// A variable that changes later does not change results; a narrowed tensor counts by its own values.
fn results_are_owned(comm: &dyn Communicator) -> Result<()> {
    let variable = candle_core::Var::zeros(5, DType::F32, &Device::Cpu)?;
    let results = [
        comm.all_reduce(&variable, ReduceOp::Sum)?,
        comm.all_gather(&variable)?.narrow(0, 0, 5)?,
        comm.broadcast(&variable, 0)?,
    ];
    variable.set(&Tensor::ones(5, DType::F32, &Device::Cpu)?)?;
    for result in results {
        expect("a result of a variable", &result, DType::F32, vec![0.0; 5])?;
        ensure(!result.track_op(), || "a result of a variable records a graph".into())?;
    }
    let part = tensor(values(0, 0..20), DType::F32)?.narrow(0, 3, 9)?;
    expect("broadcast of a part", &comm.broadcast(&part, 0)?, DType::F32, values(0, 3..12))
}

/// Calls that are begun keep their order and their results, however late and in whatever order these are waited for, and
/// whatever becomes of their tensors.
fn begun(comm: &dyn Communicator) -> Result<()> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    let variable = candle_core::Var::from_tensor(&tensor(values(rank, 0..ranks * 5), DType::F32)?)?;
    let scattered = comm.begin(Call::ReduceScatter(ReduceOp::Sum), &variable)?;
    let gathered = comm.begin(Call::AllGather, &variable)?;
    variable.set(&Tensor::zeros(ranks * 5, DType::F32, &Device::Cpu)?)?;
    comm.barrier()?;
    let zeros = comm.begin(Call::AllReduce(ReduceOp::Max), &variable)?;
    expect("all_reduce begun", &zeros.wait()?, DType::F32, vec![0.0; ranks * 5])?;
    let all = (0..ranks).flat_map(|rank| values(rank, 0..ranks * 5)).collect();
    expect("all_gather begun", &gathered.wait()?, DType::F32, all)?;
    let factor = (1..=ranks).sum::<usize>() as f64;
    let mine = values(0, rank * 5..(rank + 1) * 5).into_iter().map(|v| v * factor).collect();
    expect("reduce_scatter begun", &scattered.wait()?, DType::F32, mine)?;
    // One that nobody waits for does not hold up the others.
    drop(comm.begin(Call::AllGather, &variable)?);
    comm.barrier()
}

/// Messages of different lengths.
fn messages(comm: &dyn Communicator) -> Result<()> {
    let word = |rank: usize| "x".repeat(rank * 3);
    let all = exchange(comm, &word(comm.rank()))?;
    let expected = (0..comm.world_size()).map(word).collect::<Vec<_>>();
    ensure(all == expected, || format!("exchange gives {all:?}, not {expected:?}"))
}

/// Mistakes of the caller are errors on every rank, before anything is sent.
fn mistakes(comm: &dyn Communicator) -> Result<()> {
    let ranks = comm.world_size();
    let refused = |outcome: Result<Tensor>, part: String| match outcome {
        Err(Error::Failed(message)) if message.contains(&part) => Ok(()),
        other => Err(Error::Failed(format!("expected an error with {part:?}, not {other:?}"))),
    };
    let line = tensor(values(0, 0..ranks + 1), DType::F32)?;
    refused(comm.broadcast(&line, ranks), format!("root is rank {ranks}, but there are {ranks} ranks"))?;
    refused(comm.all_reduce(&line.unsqueeze(0)?, ReduceOp::Sum), "one dimension".into())?;
    refused(comm.all_gather(&line.to_dtype(DType::I64)?), "not i64".into())?;
    if ranks > 1 {
        let part = format!("length {} is not a multiple of {ranks} ranks", ranks + 1);
        refused(comm.reduce_scatter(&line, ReduceOp::Sum), part)?;
    }
    Ok(())
}

fn expect(what: &str, found: &Tensor, dtype: DType, expected: Vec<f64>) -> Result<()> {
    let length = expected.len();
    ensure(found.dtype() == dtype, || format!("{what} of {dtype:?} gives {:?}", found.dtype()))?;
    let found = found.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    ensure(found.len() == length, || format!("{what} of {dtype:?} gives {} values, not {length}", found.len()))?;
    let wrong = found.iter().zip(&expected).position(|(found, expected)| found != expected);
    match wrong {
        None => Ok(()),
        Some(i) => Err(Error::Failed(format!(
            "{what} of {dtype:?}, {length} values: value {i} is {}, not {}",
            found[i], expected[i]
        ))),
    }
}

fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Failed(message())) }
}
