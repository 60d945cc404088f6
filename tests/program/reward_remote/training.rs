//! Runs whose reward server fails, alone and on two ranks.

use super::server::{Does, Server};
use super::{right, says};
use crate::common::Job;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

/// Within which a run of two ranks ends, whatever its server does.
const PATIENCE: Duration = Duration::from_secs(60);

/// A run of four updates of 2 x 2 images on the embedded task, by the server's scores.
fn run(out: &Path, server: &Server, ranks: usize, settings: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_flowrl-dist");
    let start = match ranks {
        1 => Command::new(program),
        _ => {
            let mut mpirun = Command::new("mpirun");
            mpirun.args(["--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string(), program]);
            mpirun.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
            mpirun
        }
    };
    with_server(start, out, server, settings).output().unwrap()
}

/// Adds the run's arguments to what starts the program.
fn with_server(mut command: Command, out: &Path, server: &Server, settings: &[&str]) -> Command {
    let config = out.with_extension("toml");
    let text = format!(
        "[[reward]]\nname = \"remote\"\nurl = \"{}\"\nreward = \"good\"\ntimeout_s = 60\nretries = 1\n",
        server.url
    );
    std::fs::write(&config, text).unwrap();
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
    command.env("RAYON_NUM_THREADS", "1");
    // Servers of rewards are asked directly, whatever proxy a cluster has for the web.
    command.env("ALL_PROXY", "http://127.0.0.1:9").env_remove("NO_PROXY").env_remove("no_proxy");
    command
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// The updates that metrics.jsonl tells of, and how many groups each left out.
fn log(out: &Path) -> Vec<(u64, f64)> {
    let log = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let updates = lines.filter(|line| line["loss"].is_number());
    updates.map(|line| (line["update"].as_u64().unwrap(), line["dropped_groups"].as_f64().unwrap())).collect()
}

fn updates(out: &Path) -> Vec<u64> {
    log(out).into_iter().map(|(update, _)| update).collect()
}

fn dropped_groups(out: &Path) -> Vec<f64> {
    log(out).into_iter().map(|(_, dropped)| dropped).collect()
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
    let output = run(&out, &server, 1, &["reward.0.on_failure=drop", "reward.0.retries=0"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("images are left out: no face"), "{said}");
    assert_eq!(dropped_groups(&out), [0.0, 1.0, 0.0, 0.0]);
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
    assert!(updates(&out).is_empty());
}

/// A token that is not there, and a reward that the server has not: a mistake of the configuration, told before the run
/// folder has more than its log.
#[test]
fn a_mistake_in_a_remote_reward_is_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let server = Server::start(|_| right());
    let output = run(&out, &server, 1, &["reward.0.token_env=FLOWRL_NO_SUCH_TOKEN"]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("reward[0].token_env = \"FLOWRL_NO_SUCH_TOKEN\": there is no such variable"), "{said}");
    assert!(!out.exists(), "nothing was begun");

    let named = Server::serving(&["better"]);
    let output = run(&out, &named, 1, &[]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("the server has no such reward, but better; name one of them"), "{said}");
    assert!(!out.join("metrics.jsonl").exists(), "{said}");
}

/// Everything in a folder, and below it.
fn all_of(folder: &Path) -> String {
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let text = |path: std::path::PathBuf| match path.is_dir() {
        true => all_of(&path),
        false => String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned(),
    };
    paths.map(text).collect()
}

/// With every message of every library, and a server that repeats what it was sent.
#[test]
fn a_token_is_in_no_log_at_any_level() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let server = Server::start(|n| match n {
        2 => Does::Says(500, "oops: {authorization}".into()),
        0..4 => right(),
        _ => says(r#"{"results": [{}, {}], "errors": [{"good": "{authorization}"}, {"good": "{authorization}"}]}"#),
    });
    let start = Command::new(env!("CARGO_BIN_EXE_flowrl-dist"));
    let mut command = with_server(start, &out, &server, &["reward.0.token_env=FLOWRL_TEST_TOKEN"]);
    // Whatever part of it stands in a line, as text or in hexadecimal, it can be told.
    let token = "ZQZQ0aZQZQ1bZQZQ2c".repeat(4);
    let output = command.env("FLOWRL_TEST_TOKEN", &token).env("RUST_LOG", "trace").output().unwrap();
    let written = text(&output) + &all_of(&out);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("authorization: Bearer (token)"), "{}", text(&output));
    // The client's own words on each request are there, and the run's on what the server said.
    let told = ["HEADERS ARE REDACTED", "oops: authorization: Bearer (token)"];
    assert!(told.iter().all(|words| written.contains(words)), "little is told");
    let lines = written.lines().filter(|line| line.contains("ZQZQ") || line.contains("5a51"));
    assert_eq!(lines.collect::<Vec<_>>(), Vec::<&str>::new());
}

/// Two ranks that meet over TCP, so that each has an exit code and a last word of its own: both, and seconds.
fn two_ranks(out: &Path, server: &Server, settings: &[&str]) -> (Vec<i32>, String, f64) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let settings = [settings, &["parallel.backend=tcp"]].concat();
    let ranks = ["0", "1"].map(|rank| {
        let mut start = Command::new(env!("CARGO_BIN_EXE_flowrl-dist"));
        start.envs([("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")]);
        start.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port)]);
        Job::start(&mut with_server(start, out, server, &settings))
    });
    let outputs = ranks.map(|rank| rank.finish(PATIENCE));
    let seconds = outputs.iter().map(|output| output.elapsed.as_secs_f64()).fold(0.0, f64::max);
    (outputs.iter().map(|output| output.code()).collect(), outputs.map(|output| output.to_string()).concat(), seconds)
}

/// Every fault on two ranks, with both policies: how each rank ends, what is saved, and that the server is named; a line
/// each of a table. The second request of the second iteration is the first that meets the fault.
#[test]
fn every_fault_ends_as_configured_on_both_ranks() {
    let nan = r#"{"results": [{"good": NaN}, {"good": 1}]}"#;
    // What the server does, whether it does so from then on, and what is said of it.
    let faults = [
        ("down at the start", None, true, "start the server"),
        ("dies in the middle", Some(Does::HangsUp), true, ""),
        ("hangs up once", Some(Does::HangsUp), false, ""),
        ("slow", Some(Does::Sleeps(PATIENCE)), false, "no answer in time"),
        ("nonsense", Some(says("<html>oops")), false, "is not JSON"),
        ("wrong count", Some(says(r#"{"results": [{n}, {n}]}"#)), false, "it gave 4 scores for 2 images"),
        ("NaN", Some(says(nan)), false, "is not JSON"),
    ];
    println!("| fault | policy | exit codes | updates done | newest checkpoint | dropped groups | s |");
    println!("|---|---|---|---|---|---|---|");
    for ((fault, does, for_good, reason), policy) in faults.iter().flat_map(|fault| [(fault, "stop"), (fault, "drop")])
    {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("run");
        let (doing, for_good) = (does.clone(), *for_good);
        // An evaluation by each rank, two requests of the first iteration, one of the second.
        let mut server = Server::start(move |n| match &doing {
            Some(doing) if n == 5 || (n > 5 && for_good) => doing.clone(),
            _ => right(),
        });
        if does.is_none() {
            server.url = "http://127.0.0.1:9".into();
        }
        let timeout = if *fault == "slow" { 3 } else { 60 };
        let settings = [format!("timeout_s={timeout}"), format!("on_failure={policy}"), "retries=0".into()];
        let settings = settings.map(|setting| format!("reward.0.{setting}"));
        let (codes, said, seconds) = two_ranks(&out, &server, &settings.each_ref().map(String::as_str));
        let logs =
            ["0", "1"].map(|rank| std::fs::read_to_string(out.join(format!("logs/rank_0000{rank}.log"))).unwrap());
        let terminal =
            said.lines().any(|line| line.contains("images of 1 other rank(s) have no score: logs/rank_00001.log"));
        assert!(terminal || !logs[1].contains("images are left out"), "{said}");
        let said = format!("{fault}, {policy}: {said}\n{}", logs.concat());
        let saved = (1..=4).rev().find(|n| out.join(format!("checkpoints/update_{n:08}/COMPLETE")).is_file());
        let found = (codes, updates(&out).len(), saved, dropped_groups(&out));
        let (codes, done, _, groups) = &found;
        let newest = saved.map_or("none".into(), |update| format!("update {update}"));
        println!("| {fault} | {policy} | {codes:?} | {done} | {newest} | {groups:?} | {seconds:.1} |");
        assert!(said.contains(&format!("reward good: {}: ", server.url)) && said.contains(reason), "{said}");
        // What is dropped is one group; a server that stays away leaves none of the third iteration.
        let expected = match (*fault, policy) {
            ("down at the start", _) => (vec![1, 1], 0, None, vec![]),
            (_, "stop") => (vec![1, 1], 1, Some(1), vec![0.0]),
            ("dies in the middle", _) => (vec![1, 1], 2, Some(2), vec![0.0, 1.0]),
            _ => (vec![0, 0], 4, Some(4), vec![0.0, 1.0, 0.0, 0.0]),
        };
        assert_eq!(found, expected, "{said}");
    }
}
