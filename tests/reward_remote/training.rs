//! Runs whose reward server fails, alone and on two ranks.

use super::server::{Does, Server};
use super::{right, says};
use std::path::Path;
use std::process::{Command, Output};

/// A run of four updates of 2 x 2 images on the embedded task, by the server's scores.
fn run(out: &Path, server: &Server, ranks: usize, settings: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_flowrl-dist");
    let config = out.with_extension("toml");
    let text = format!(
        "[[reward]]\nname = \"remote\"\nurl = \"{}\"\nreward = \"good\"\ntimeout_s = 60\nretries = 1\n",
        server.url
    );
    std::fs::write(&config, text).unwrap();
    let mut command = match ranks {
        1 => Command::new(program),
        _ => {
            let mut mpirun = Command::new("mpirun");
            mpirun.args(["--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string(), program]);
            mpirun.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
            mpirun
        }
    };
    command.arg("train").arg("--config").arg(&config).arg("--out").arg(out);
    let small = [
        "run.updates=4",
        "run.eval_every=0",
        "run.checkpoint_every=0",
        "eval.prompts=2",
        "eval.steps=1",
        "sampler.steps=2",
        "batch.prompts=2",
        "batch.images_per_prompt=2",
        "batch.micro_batch=2",
        "batch.timesteps=1",
    ];
    command.args(small.iter().chain(settings).flat_map(|setting| ["--set", setting]));
    command.env("RAYON_NUM_THREADS", "1").output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// The updates that metrics.jsonl tells of.
fn updates(out: &Path) -> Vec<u64> {
    let log = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter(|line| line["loss"].is_number()).map(|line| line["update"].as_u64().unwrap()).collect()
}

/// The evaluation before the first update asks once a rank, an iteration twice in all, once for each micro-batch: the server
/// dies between the two requests of the second iteration.
fn stops_and_continues(ranks: usize) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let fails = ranks + 2 + 1;
    let dying = Server::start(move |n| if n < fails { right() } else { Does::HangsUp });
    let output = run(&out, &dying, ranks, &[]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("reward good: {}: ", dying.url)), "{said}");
    assert!(said.contains("saved update 1: the same command continues"), "{said}");
    assert!(out.join("checkpoints/update_00000001/COMPLETE").is_file(), "{said}");

    let output = run(&out, &Server::start(|_| right()), ranks, &["run.name=again"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(updates(&out), [1, 2, 3, 4]);
}

#[test]
fn a_run_whose_server_dies_stops_with_a_checkpoint_and_continues_from_there() {
    stops_and_continues(1);
}

#[cfg(feature = "mpi")]
#[test]
fn so_does_a_run_on_two_ranks() {
    stops_and_continues(2);
}

#[test]
fn a_run_may_go_on_without_the_groups_that_have_no_score() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    // A request of the second iteration, one of two with a group each: its last image fails.
    let server = Server::start(|n| match n {
        3 => says(r#"{"results": [{"good": 1}, {}], "errors": [{}, {"good": "no face"}]}"#),
        _ => says(r#"{"results": [{n}]}"#),
    });
    let output = run(&out, &server, 1, &["reward.0.on_failure=drop"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("images are left out: no face"), "{said}");
    let log = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let dropped = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["dropped_groups"].as_f64();
    assert_eq!(log.lines().filter_map(dropped).collect::<Vec<_>>(), [0.0, 1.0, 0.0, 0.0]);
}

#[test]
fn a_run_does_not_begin_without_its_server() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let mut gone = Server::start(|_| right());
    gone.url = "http://127.0.0.1:9".into();
    let output = run(&out, &gone, 1, &["reward.0.retries=0"]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("reward good: http://127.0.0.1:9: ") && said.contains("start the server"), "{said}");
    assert!(!out.join("metrics.jsonl").is_file() || updates(&out).is_empty());
}
