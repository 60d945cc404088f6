//! Collectives of more elements than MPI's counts can say, between two processes of this host.

use candle_core::{Device, Tensor};
use flowrl_dist::comm::{Backend, Launch, ReduceOp, World, launched_ranks};
use flowrl_dist::{Error, Result};
use std::process::Command;
use std::time::{Duration, Instant};

/// What the program is asked for.
pub const NAME: &str = "large-counts";

const RANKS: usize = 2;
const ELEMENTS: usize = (1 << 31) + 5;
const DEADLINE: Duration = Duration::from_secs(300);

/// Elements that are made and looked at together.
const PIECE: usize = 1 << 26;

/// Broadcasts and all-reduces, each value checked; prints seconds and memory. Starts itself again under mpirun.
///
/// # Errors
/// mpirun cannot be started, a rank fails, or a value is wrong.
pub fn run() -> Result<()> {
    if launched_ranks()? != Some(RANKS) {
        let program = std::env::current_exe().map_err(Error::io("/proc/self/exe"))?;
        let mut command = Command::new("mpirun");
        command.args(["--oversubscribe", "-n", &RANKS.to_string()]).arg(program).arg(NAME);
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
        let status = command.status().map_err(Error::io("mpirun"))?;
        return if status.success() { Ok(()) } else { Err(Error::Failed(format!("mpirun: {status}"))) };
    }
    let world = World::from_environment(&Launch::new(Backend::Mpi, DEADLINE))?;
    rank(&world).unwrap_or_else(|e| world.abort(e.exit_code(), &e.to_string()));
    Ok(())
}

/// Element `i` of a rank: below 64 on rank 0, one more on each later rank.
fn value(rank: usize, i: usize) -> u8 {
    ((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 58) as u8 + rank as u8
}

fn rank(world: &World) -> Result<()> {
    let mine: Vec<u8> = (0..ELEMENTS).map(|i| value(world.rank(), i)).collect();
    let mine = Tensor::from_vec(mine, ELEMENTS, &Device::Cpu)?;
    measure(world, "broadcast", || world.host.broadcast(&mine, 1), |i| value(1, i))?;
    let sum = |i| (0..RANKS).map(|rank| value(rank, i)).sum();
    measure(world, "all-reduce", || world.host.all_reduce(&mine, ReduceOp::Sum), sum)
}

fn measure(
    world: &World,
    name: &str,
    work: impl FnOnce() -> Result<Tensor>,
    expected: impl Fn(usize) -> u8,
) -> Result<()> {
    world.host.barrier()?;
    let since = Instant::now();
    let result = work()?;
    let seconds = since.elapsed().as_secs_f64();
    if result.elem_count() != ELEMENTS {
        return Err(Error::Failed(format!("{name}: {} elements", result.elem_count())));
    }
    for start in (0..ELEMENTS).step_by(PIECE) {
        let values = result.narrow(0, start, PIECE.min(ELEMENTS - start))?.to_vec1::<u8>()?;
        if let Some(wrong) = (0..values.len()).find(|&i| values[i] != expected(start + i)) {
            let (i, value) = (start + wrong, values[wrong]);
            return Err(Error::Failed(format!("{name}: element {i} is {value}, not {}", expected(i))));
        }
    }
    world.host.barrier()?;
    if world.rank() == 0 {
        let (gb, resident) = (ELEMENTS as f64 / 1e9, resident());
        eprintln!(
            "{name:>10} of {ELEMENTS} u8 on {RANKS} ranks: {seconds:.2} s, {:.2} GB/s, {resident} a rank",
            gb / seconds
        );
    }
    Ok(())
}

/// The most memory that this process has had resident.
fn resident() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("? kB").trim().to_owned()
}
