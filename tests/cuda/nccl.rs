//! The suite of all communicators on NCCL, and how its ranks end, also where its sums are wrong: several ranks on one GPU, each a process of its own. Where
//! there is no GPU each test says so and passes: launch/gpu-check.sh runs them where there is one.

use crate::common::{ROLE, test_of};
use candle_core::{DType, Device, Tensor, Var};
use flowrl_dist::comm::testing::conformance;
use flowrl_dist::comm::{Call, Communicator, NCCL_ID_BYTES, Nccl, NcclMembership, ReduceOp};
use flowrl_dist::device::{DeviceChoice, select};
use flowrl_dist::error::{EXIT_FAILED, EXIT_RESTART};
use flowrl_dist::{Error, Result};
use signal_hook::consts::{SIGKILL, SIGSTOP};
use signal_hook::low_level::raise;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const RANK: &str = "FLOWRL_TEST_RANK";
const RANKS: &str = "FLOWRL_TEST_RANKS";
const ID: &str = "FLOWRL_TEST_ID";

/// Several ranks that spin on one GPU take turns: slow.
const TIMEOUT: Duration = Duration::from_secs(120);
const DEADLINE: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_secs(5);

/// One rank; does nothing in the run of the tests themselves.
#[test]
fn worker() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let number = |name: &str| std::env::var(name).unwrap().parse::<usize>().unwrap();
    let (rank, ranks) = (number(RANK), number(RANKS));
    match run(&role, rank, ranks) {
        Ok(()) => println!("RANK {rank} IS DONE"),
        Err(e) => {
            eprintln!("rank {rank}: {e}");
            std::process::exit(e.exit_code());
        }
    }
}

fn run(role: &str, rank: usize, ranks: usize) -> Result<()> {
    let (device, _) = select(DeviceChoice::Cuda, rank, ranks)?;
    let deadline = if role == "conform" { DEADLINE } else { SHORT };
    let id = shared_id(rank)?;
    let members = NcclMembership { id, rank, world_size: ranks, deadline, abort: signal_hook::low_level::exit };
    if role == "alone" {
        return match Nccl::join(&device, &NcclMembership { world_size: 2, ..members }) {
            Err(Error::Peer(message)) => {
                println!("NOBODY CAME: {message}");
                Ok(())
            }
            Err(e) => Err(e),
            Ok(_) => Err(Error::Failed("joined a peer that is not there".into())),
        };
    }
    let comm = Nccl::join(&device, &members)?;
    if role == "conform" {
        conformance(&comm)?;
        return on_the_gpu(&comm, &device);
    }
    let ones = Tensor::ones(1 << 20, DType::F32, &device)?;
    comm.all_reduce(&ones, ReduceOp::Sum)?.to_vec1::<f32>()?;
    if rank == 1 {
        raise(if role == "kill" { SIGKILL } else { SIGSTOP }).unwrap();
    }
    comm.all_reduce(&ones, ReduceOp::Sum)?.to_vec1::<f32>()?;
    Err(Error::Failed("a collective ended without a peer".into()))
}

/// Rank 0 makes the id and lays it down; the others wait for it.
fn shared_id(rank: usize) -> Result<[u8; NCCL_ID_BYTES]> {
    let path = std::env::var(ID).unwrap();
    if rank == 0 {
        let id = Nccl::new_id()?;
        std::fs::write(format!("{path}.new"), id).unwrap();
        std::fs::rename(format!("{path}.new"), &path).unwrap();
        return Ok(id);
    }
    let begun = Instant::now();
    while !Path::new(&path).exists() {
        assert!(begun.elapsed() < DEADLINE, "rank 0 lays down no id");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(std::fs::read(path).unwrap().try_into().unwrap())
}

/// Large tensors that stay on the GPU, begun and overtaken by work on them.
fn on_the_gpu(comm: &dyn Communicator, device: &Device) -> Result<()> {
    let (rank, ranks, len) = (comm.rank(), comm.world_size(), 3 << 18);
    let mine = Tensor::full((rank + 1) as f32, len * ranks, device)?;
    for dtype in [DType::F32, DType::BF16] {
        let variable = Var::from_tensor(&mine.to_dtype(dtype)?)?;
        let scattered = comm.begin(Call::ReduceScatter(ReduceOp::Sum), &variable)?;
        let gathered = comm.begin(Call::AllGather, &variable.narrow(0, (ranks - 1) * len, len)?)?;
        variable.set(&variable.as_tensor().affine(0.0, -1.0)?)?;
        let reduced = comm.begin(Call::AllReduce(ReduceOp::Sum), &variable)?;
        let busy = Tensor::ones((512, 512), DType::F32, device)?;
        let busy = (0..20).try_fold(busy.clone(), |x, _| x.matmul(&busy)? * (1.0 / 512.0))?;
        let sum = (ranks * (ranks + 1) / 2) as f32;
        let expect = |what: &str, found: &Tensor, expected: &Tensor| -> Result<()> {
            assert!(found.device().is_cuda() && found.dtype() == dtype);
            let off = (found.to_dtype(DType::F32)? - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
            if off == 0.0 { Ok(()) } else { Err(Error::Failed(format!("{what} of {dtype:?} is off by {off}"))) }
        };
        expect("reduce_scatter", &scattered.wait()?, &Tensor::full(sum, len, device)?)?;
        let all =
            (0..ranks).map(|r| Tensor::full((r + 1) as f32, len, device)).collect::<candle_core::Result<Vec<_>>>()?;
        expect("all_gather", &gathered.wait()?, &Tensor::cat(&all, 0)?)?;
        expect("all_reduce", &reduced.wait()?, &Tensor::full(-(ranks as f32), len * ranks, device)?)?;
        assert_eq!(busy.max_all()?.to_scalar::<f32>()?, 1.0);
    }
    Ok(())
}

/// A rank and what it printed.
struct Ended {
    code: Option<i32>,
    output: String,
    after: Duration,
}

/// Starts `ranks` ranks and waits for those of `waited`, killing the others then.
fn ranks(role: &str, ranks: usize, waited: &[usize]) -> Vec<Ended> {
    let folder = tempfile::tempdir().unwrap();
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([&test_of(module_path!(), "worker"), "--exact", "--nocapture"])
            .envs([(ROLE, role.to_owned()), (RANK, rank.to_string()), (RANKS, ranks.to_string())])
            .env(ID, folder.path().join("id"))
            // One GPU is enough: each rank is a host of its own to NCCL, and they talk over the loopback.
            .envs([("FLOWRL_SHARE_GPU", "1".to_owned()), ("NCCL_HOSTID", format!("rank{rank}"))])
            .envs([("NCCL_SOCKET_IFNAME", "lo"), ("NCCL_NET", "Socket"), ("NCCL_IB_DISABLE", "1")])
            .envs([("NCCL_MNNVL_ENABLE", "0"), ("NCCL_DEBUG", "WARN")])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let begun = Instant::now();
    let mut children: Vec<Option<Child>> = (0..ranks).map(|rank| Some(start(rank))).collect();
    let running = |child: &mut Option<Child>| child.as_mut().unwrap().try_wait().unwrap().is_none();
    while waited.iter().any(|&rank| running(&mut children[rank])) && begun.elapsed() < TIMEOUT {
        std::thread::sleep(Duration::from_millis(20));
    }
    let after = begun.elapsed();
    for child in children.iter_mut().flatten() {
        let _ = child.kill(); // a stopped one too
    }
    children
        .iter_mut()
        .map(|child| {
            let output = child.take().unwrap().wait_with_output().unwrap();
            let text = [output.stdout, output.stderr].concat();
            Ended { code: output.status.code(), output: String::from_utf8_lossy(&text).into_owned(), after }
        })
        .collect()
}

/// Whether there is a GPU and NCCL; a loud line where not.
fn there_is_nccl() -> bool {
    let (device, why) = select(DeviceChoice::Auto, 0, 1).unwrap();
    if device.is_cpu() {
        println!("SKIPPED, NOTHING WAS TESTED: {why}");
    }
    device.is_cuda()
}

#[test]
fn nccl_conforms_on_1_2_and_4_ranks() {
    if !there_is_nccl() {
        return;
    }
    for count in [1, 2, 4] {
        let all: Vec<usize> = (0..count).collect();
        for (rank, ended) in ranks("conform", count, &all).iter().enumerate() {
            assert!(ended.output.contains(&format!("RANK {rank} IS DONE")), "{count} ranks: {}", ended.output);
        }
    }
}

#[test]
fn a_killed_or_stopped_rank_ends_the_others_within_the_deadline() {
    if !there_is_nccl() {
        return;
    }
    for role in ["kill", "stop"] {
        let first = &ranks(role, 2, &[0])[0];
        assert_eq!(first.code, Some(EXIT_RESTART), "{role}: {}", first.output);
        // Its second call on this plane, however often the threads looked at it.
        assert!(first.output.contains("all_reduce #2 of the device plane"), "{role}: {}", first.output);
        assert!(first.after < SHORT + Duration::from_secs(40), "{role}: {:?}", first.after);
    }
}

#[test]
fn nobody_waits_for_ever_for_a_peer_to_join() {
    if !there_is_nccl() {
        return;
    }
    let first = &ranks("alone", 1, &[0])[0];
    assert!(first.output.contains("NOBODY CAME: NCCL, init"), "{}", first.output);
}

/// The program itself: beside this one in launch/gpu-check.sh, which carries both to another machine.
fn program() -> PathBuf {
    std::env::var_os("FLOWRL_BIN").map_or_else(|| env!("CARGO_BIN_EXE_flowrl-dist").into(), PathBuf::from)
}

#[test]
fn a_wrong_sum_stops_the_run_before_it_begins() {
    if std::env::var_os("EMULATED_GPU").is_none() {
        println!("SKIPPED, NOTHING WAS TESTED: only an emulated NCCL can be told to be wrong");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let numbered = |(name, number): (&'static str, usize)| (name, number.to_string());
    let start = |rank: usize| {
        let mut command = Command::new(program());
        command
            .args(["--set", "parallel.device=cuda", "--set", "parallel.backend=tcp", "--set", "run.updates=1", "--out"])
            .arg(out.path().join("run"))
            .envs([("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)].map(numbered))
            .envs([("MASTER_ADDR", "127.0.0.1".into()), ("MASTER_PORT", port.to_string())])
            .envs([("FLOWRL_TOKEN", "of the test"), ("FLOWRL_SHARE_GPU", "1"), ("EMULATED_NCCL_WRONG_RANK", "1")])
            .env("NCCL_HOSTID", format!("rank{rank}"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let ended = |child: Child| {
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let outputs = [start(0), start(1)].map(ended);
    for (code, output) in &outputs {
        assert_eq!(*code, Some(EXIT_FAILED), "{output}");
    }
    let said: String = outputs.into_iter().map(|(_, output)| output).collect();
    assert!(said.contains("the device plane computes wrongly on rank 1 on "), "{said}");
    assert!(said.contains("all_reduce of ") && said.contains("GPUs over NCCL"), "{said}");
}
