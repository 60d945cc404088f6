//! What the world makes of its launcher, seen from outside.

use crate::common::{ROLE, test_of};
use flowrl_dist::comm::{Backend, Launch, World};
use flowrl_dist::error::EXIT_USAGE;
use flowrl_dist::interrupt::Interrupt;
use signal_hook::consts::SIGINT;
use signal_hook::low_level::raise;
use std::process::{Command, Output};
use std::time::Duration;

/// One process; does nothing in the run of the tests themselves.
#[test]
fn worker() {
    let backend = match std::env::var(ROLE).as_deref() {
        Ok("auto") => Backend::Auto,
        Ok("solo") => Backend::Solo,
        Ok("mpi") => Backend::Mpi,
        Ok("interrupted twice") => {
            let interrupt = Interrupt::install(|_| ()).unwrap();
            raise(SIGINT).unwrap();
            println!("FIRST {:?}", interrupt.requested());
            raise(SIGINT).unwrap();
            panic!("a second SIGINT ends the process");
        }
        _ => return,
    };
    match World::from_environment(&Launch::new(backend, Duration::from_secs(60))) {
        Ok(world) => println!("WORLD {}", world.describe()),
        Err(e) => {
            eprintln!("{e}");
            std::process::exit(e.exit_code());
        }
    }
}

/// This program as a worker, without any launcher's variables but these.
fn worker_with(role: &str, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if ["OMPI_", "PMI", "SLURM_", "RANK", "WORLD_SIZE", "MASTER_"].iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
        .args([&test_of(module_path!(), "worker"), "--exact", "--nocapture"])
        .env(ROLE, role)
        .envs(variables.iter().copied());
    command.output().unwrap()
}

fn refused(output: Output, word: &str) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(EXIT_USAGE), "{message}");
    assert!(message.contains(word), "{message}");
}

#[test]
fn a_process_without_a_launcher_is_alone() {
    for role in ["auto", "solo"] {
        let output = worker_with(role, &[]);
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && stdout.contains("WORLD 1 rank on 1 host alone"), "{stdout}");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_remedy() {
    refused(worker_with("mpi", &[]), "mpirun -n N");
    refused(worker_with("solo", &[("OMPI_COMM_WORLD_SIZE", "2")]), "backend = \"auto\"");
    let srun = [("SLURM_STEP_ID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_PROCID", "1")];
    // With NCCL, ranks meet over TCP where MPI does not join them; here nobody tells them where.
    let remedy = |without_nccl| if cfg!(feature = "cuda") { "MASTER_ADDR" } else { without_nccl };
    refused(worker_with("auto", &srun), remedy("srun --mpi=pmix"));
    if !cfg!(feature = "mpi") {
        refused(worker_with("auto", &[("OMPI_COMM_WORLD_SIZE", "2")]), remedy("built without MPI"));
    }
    refused(worker_with("auto", &[("RANK", "0"), ("WORLD_SIZE", "2")]), "MASTER_ADDR is not set");
    refused(worker_with("auto", &[("RANK", "abc"), ("WORLD_SIZE", "2")]), "RANK is \"abc\"");
}

/// As mpiexec of MPICH starts a program that was built with another MPI: each process is a world of its own.
#[cfg(feature = "mpi")]
#[test]
fn a_world_that_mpi_does_not_join_is_refused() {
    for rank in ["0", "1"] {
        let output = worker_with("auto", &[("PMI_RANK", rank), ("PMI_SIZE", "2")]);
        assert!(!String::from_utf8_lossy(&output.stdout).contains("WORLD"), "{output:?}");
        refused(output, "mpiexec (PMI) started 2 ranks, but MPI (Open MPI");
    }
}

#[test]
fn a_slurm_script_that_forgets_srun_is_refused() {
    let script = [("SLURM_JOB_ID", "7"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")];
    refused(
        worker_with("auto", &script),
        "this Slurm job has 8 tasks, but its script started the program without srun",
    );
    let shell = [("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "8")];
    for output in [worker_with("solo", &script), worker_with("auto", &shell)] {
        assert!(String::from_utf8_lossy(&output.stdout).contains("WORLD 1 rank on 1 host alone"), "{output:?}");
    }
    // What one process does is done there.
    let mut plan = Command::new(env!("CARGO_BIN_EXE_flowrl-dist"));
    assert!(plan.arg("plan").envs(script).output().unwrap().status.success());
}

/// mpirun ends the others of a rank that cannot begin, which wait for it in MPI's own start.
#[cfg(feature = "mpi")]
#[test]
fn a_rank_that_cannot_begin_ends_all_at_once() {
    let program = env!("CARGO_BIN_EXE_flowrl-dist");
    let out = tempfile::tempdir().unwrap();
    let since = std::time::Instant::now();
    let output = Command::new("mpirun")
        .args(["--oversubscribe", "-n", "1", program, "--out", out.path().to_str().unwrap(), ":"])
        .args(["-n", "1", program, "--set", "data.train=none.txt"])
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
        .output()
        .unwrap();
    refused(output, "data.train = \"none.txt\": there is no such file");
    assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
}

#[test]
fn a_second_interrupt_ends_the_process() {
    let output = worker_with("interrupted twice", &[]);
    assert_eq!(output.status.code(), Some(130));
    assert!(String::from_utf8_lossy(&output.stdout).contains("FIRST Some(\"SIGINT\")"));
}
