//! The batch scripts on a real Slurm cluster of two virtual nodes (launch/slurm-local.sh): however a job is interrupted, it
//! ends as the unbroken one, bit for bit. Skipped, with a line that says so, where the cluster needs privileges that are
//! missing.

mod cluster;

use crate::runs::{Record, Training};
use cluster::{Batch, cluster};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Small, and long enough to be interrupted.
const SETTINGS: [&str; 5] =
    ["batch.timesteps=1", "sampler.steps=2", "eval.steps=2", "eval.prompts=2", "run.eval_every=0"];

/// Updates of a run.
const UPDATES: u64 = 6;

fn training() -> Training {
    Training::new(&SETTINGS)
}

/// The run of 2 x 2 ranks that nothing disturbed.
fn unbroken(cluster: &Batch) -> Arc<Record> {
    static UNBROKEN: OnceLock<Arc<Record>> = OnceLock::new();
    UNBROKEN.get_or_init(|| Arc::new(undisturbed(cluster, UPDATES))).clone()
}

fn undisturbed(cluster: &Batch, updates: u64) -> Record {
    let training = training();
    let job = cluster.submit(&[], &training, updates);
    let end = job.finish();
    assert_eq!((end.state.as_str(), end.restarts), ("COMPLETED", 0), "{}", job.log());
    assert!(job.log().contains("4 ranks on 2 hosts over MPI"), "{}", job.log());
    training.record()
}

/// A job that `disturb` interrupts after its first update goes back into the queue, continues and ends as the unbroken one.
fn interrupted(name: &str, options: &[&str], disturb: impl FnOnce(&Batch, &cluster::Job)) {
    let Some(cluster) = cluster() else { return };
    let unbroken = unbroken(&cluster);
    interrupted_run(name, options, UPDATES, &cluster, &unbroken, disturb);
}

/// The same for a run of `updates`, which ends as `unbroken`.
fn interrupted_run(
    name: &str,
    options: &[&str],
    updates: u64,
    cluster: &Batch,
    unbroken: &Record,
    disturb: impl FnOnce(&Batch, &cluster::Job),
) {
    let training = training();
    let job = cluster.submit(options, &training, updates);
    job.until("the first update", || training.logged(1));
    let disturbed = Instant::now();
    disturb(cluster, &job);
    job.until("the second start", || job.log().contains(", start 2)"));
    let again = disturbed.elapsed();
    let end = job.finish();
    eprintln!("{name}: running again after {again:.1?}, done after {:.1?}", disturbed.elapsed());
    assert_eq!((end.state.as_str(), end.restarts), ("COMPLETED", 1), "{}", job.log());
    training.record().assert_equal(unbroken);
}

#[test]
fn a_job_ends_well() {
    let Some(cluster) = cluster() else { return };
    unbroken(&cluster);
}

#[test]
fn a_job_that_is_requeued_continues() {
    interrupted("requeue", &[], |cluster, job| drop(cluster.run(&["scontrol", "requeue", &job.id])));
}

/// `--signal` is sent at once where the time limit is as near as that; the second life gets more time.
#[test]
fn a_job_saves_before_its_time_limit_and_continues() {
    // Slurm looks at its clocks every few seconds: a run of six updates could be over before the signal comes.
    const LONGER: u64 = 40;
    let Some(cluster) = cluster() else { return };
    let unbroken = undisturbed(&cluster, LONGER);
    let options = ["--time=1", "--signal=B:USR1@90"];
    interrupted_run("time limit", &options, LONGER, &cluster, &unbroken, |cluster, job| {
        job.until("the signal", || job.log().contains("SIGUSR1: the ranks are asked to save and leave"));
        job.until("the queue", || job.log().contains("put back into the queue"));
        cluster.run(&["scontrol", "update", &format!("JobId={}", job.id), "TimeLimit=60"]);
    });
}

#[test]
fn a_job_that_is_sent_away_for_another_continues() {
    interrupted("preemption", &["--partition=low"], |cluster, job| {
        cluster.run(&[
            "sbatch",
            "--partition=high",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=sleep 1",
        ]);
        job.until("the queue", || job.log().contains("SIGTERM: saved update "));
    });
}

#[test]
fn a_job_whose_node_dies_continues() {
    interrupted("node failure", &[], |cluster, job| {
        cluster.local(&["kill-node", "n2"]);
        job.until("the queue", || job.state().state == "PENDING");
        cluster.local(&["start-node", "n2"]);
    });
}

/// What the user ended stays ended, saved.
#[test]
fn a_job_that_is_cancelled_saves_and_does_not_come_back() {
    let Some(cluster) = cluster() else { return };
    let training = training();
    let job = cluster.submit(&[], &training, UPDATES);
    job.until("the first update", || training.logged(1));
    cluster.run(&["scancel", &job.id]);
    job.until("the end of the script", || job.log().contains("Slurm ends this job itself"));
    assert!(training.saved() >= Some(1), "{}", job.log());
    std::thread::sleep(Duration::from_secs(5));
    let end = job.finish();
    assert_eq!((end.state.as_str(), end.restarts), ("CANCELLED", 0), "{}", job.log());
}

#[test]
fn an_array_is_one_run_each() {
    let Some(cluster) = cluster() else { return };
    let folder = tempfile::tempdir().unwrap();
    let training = training();
    let out = folder.path().join("seed-%a").display().to_string();
    let settings = training.command(1, 2);
    let mut arguments: Vec<&str> = settings.get_args().map(|a| a.to_str().unwrap()).collect();
    let folder_of_training = arguments.iter().position(|a| *a == "--out").unwrap() + 1;
    arguments[folder_of_training] = &out;
    arguments.extend(["--set", "run.seed=%a"]);
    let array = cluster.submit_arguments(&["--array=1-2", "--nodes=1"], &arguments);
    array.until("the end of both", || {
        [1, 2].iter().all(|seed| folder.path().join(format!("seed-{seed}/report.html")).exists())
    });
    for seed in ["1", "2"] {
        let config = std::fs::read_to_string(folder.path().join(format!("seed-{seed}/config.toml"))).unwrap();
        assert!(config.contains(&format!("seed = {seed}\n")), "{config}");
    }
    arguments[folder_of_training] = "one-for-all";
    arguments.retain(|argument| !argument.contains("%a"));
    arguments.pop();
    let refused = cluster.submit_arguments(&["--array=1-1", "--nodes=1"], &arguments);
    assert_eq!(refused.finish().exit_code, "2:0", "{}", refused.log());
    assert!(refused.log().contains("pass --out with %a in it"), "{}", refused.log());
}

/// The options that a batch script finds in its arguments are those that the program finds; without a cluster.
#[test]
fn a_batch_script_reads_its_arguments_as_the_program_does() {
    let root = env!("CARGO_MANIFEST_DIR");
    let with_default = |given: &[&str]| {
        let script = "home=$0; source \"$home/slurm/job.sh\"; with_default --config /d.toml \"$@\"; \
                      printf '%s\\n' \"${arguments[@]}\"";
        let mut command = std::process::Command::new("bash");
        command.args(["-c", script, root]).args(given).current_dir("/");
        command.envs([("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "1"), ("FLOWRL_BIN", env!("CARGO_BIN_EXE_flowrl-dist"))]);
        let output = command.env_remove("SLURM_ARRAY_TASK_ID").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let with =
        |rest: &[&str]| [&["--config=/d.toml"], rest].concat().into_iter().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(with_default(&[]), with(&[]));
    assert_eq!(with_default(&["--config", "a b.toml"]), ["--config=//a b.toml"]);
    assert_eq!(with_default(&["--config=/a.toml", "--out", "x-%j"]), ["--config=/a.toml", "--out=//x-7"]);
    // Values that look like options.
    for value in ["run.name=x --config y", "run.name= --config=y ", "run.name=--config"] {
        assert_eq!(with_default(&["--set", value]), with(&[&format!("--set={value}")]));
    }
    assert_eq!(with_default(&["--resume", "auto", "train"]), with(&["--resume=auto", "train"]));
    assert_eq!(with_default(&["--resume", "runs/a"]), with(&["--resume=//runs/a"]));
}

#[test]
fn a_wrong_setting_fails_at_once() {
    let Some(cluster) = cluster() else { return };
    let training = Training::new(&["optim.lr=zero"]);
    let job = cluster.submit(&[], &training, UPDATES);
    let since = Instant::now();
    let end = job.finish();
    assert_eq!((end.state.as_str(), end.restarts, end.exit_code.as_str()), ("FAILED", 0, "2:0"), "{}", job.log());
    assert!(job.log().contains("optim.lr = \"zero\": must be a number"), "{}", job.log());
    assert!(!job.log().contains("failure 1"), "started once: {}", job.log());
    assert!(since.elapsed() < Duration::from_secs(60), "{:?}", since.elapsed());
}

/// Ranks without MPI meet over TCP: the same run but for the order of sums.
#[test]
fn ranks_without_mpi_are_the_same_run() {
    let Some(cluster) = cluster() else { return };
    let unbroken = unbroken(&cluster);
    let training = Training::new(&[&SETTINGS[..], &["parallel.backend=tcp"]].concat());
    let job = cluster.submit(&["--export=ALL,FLOWRL_LAUNCHER=srun-tcp"], &training, UPDATES);
    let end = job.finish();
    assert_eq!((end.state.as_str(), end.restarts), ("COMPLETED", 0), "{}", job.log());
    assert!(job.log().contains("4 ranks on 2 hosts over TCP (rank 0 at n1, port "), "{}", job.log());
    training.record().assert_close(&unbroken, "over TCP and over MPI");
    let lonely = Training::new(&SETTINGS);
    let job = cluster.submit(&["--export=ALL,FLOWRL_LAUNCHER=srun-tcp"], &lonely, UPDATES);
    assert_eq!(job.finish().exit_code, "2:0", "{}", job.log());
    assert!(job.log().contains("use srun --mpi=pmix"), "{}", job.log());
}
