//! Signals and kills in the middle of a run.

use crate::common::{Job, Output};
use crate::runs::{Record, TIMEOUT, Training, UPDATES, alone, unbroken};
use flowrl_dist::error::{EXIT_RESTART, EXIT_USAGE};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

/// A signal after the first update makes the run save and leave; started again it ends as the unbroken one.
fn signalled(ranks: usize, signal: &str) {
    let _alone = alone();
    let unbroken = unbroken(ranks);
    let training = Training::new(&[]);
    let mut job = Job::start(&mut training.command(ranks, UPDATES));
    job.until("the first update", TIMEOUT, || training.logged(1));
    job.signal(signal);
    let output = job.finish(TIMEOUT);
    assert_eq!(output.code(), EXIT_RESTART, "{output}");
    let update = training.saved().unwrap();
    assert!(update < UPDATES, "{output}");
    let message = format!("flowrl-dist: SIG{signal}: saved update {update} of {UPDATES} in ");
    assert_eq!(output.stderr.matches(&message).count(), 1, "{output}");
    output.assert_no_leftovers();
    training.run(ranks, UPDATES);
    training.record().assert_equal(&unbroken);
}

#[test]
fn a_signal_to_mpirun_makes_all_ranks_save_and_leave() {
    signalled(2, "USR1");
}

#[test]
fn a_signal_makes_a_single_rank_save_and_leave() {
    signalled(1, "TERM");
}

/// A run whose words are read as they come.
struct Listened {
    child: Child,
    said: Option<BufReader<ChildStderr>>,
}

impl Listened {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let said = child.stderr.take().map(BufReader::new);
        Self { child, said }
    }

    /// The next line with these words.
    fn says(&mut self, words: &str) -> String {
        let mut all = String::new();
        loop {
            let mut line = String::new();
            assert!(self.said.as_mut().unwrap().read_line(&mut line).unwrap() > 0, "it ended without {words:?}: {all}");
            if line.contains(words) {
                return line;
            }
            all.push_str(&line);
        }
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    /// Its exit code, or the signal that ended it.
    fn ends(mut self) -> i32 {
        let status = self.child.wait().unwrap();
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
    }
}

impl Drop for Listened {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Long before the iteration ends; a second one does not wait for that end.
#[test]
fn the_first_ctrl_c_is_answered_at_once_and_the_second_ends_the_run() {
    let _alone = alone();
    let training = Training::new(&["batch.images_per_prompt=40", "run.eval_every=0", "eval.prompts=1"]);
    let mut run = Listened::start(&mut training.command(1, UPDATES));
    run.says("is written anew after each evaluation");
    run.signal("INT");
    assert!(run.says("SIGINT: ").contains("; again to quit without saving"));
    run.signal("INT");
    assert_eq!(run.ends(), 130);

    let mut run = Listened::start(&mut training.command(1, UPDATES));
    run.says("update 1/");
    std::thread::sleep(Duration::from_millis(200));
    let logged = training.newest_logged();
    run.signal("INT");
    let said = run.says("SIGINT: ");
    let when = said.strip_prefix("flowrl-dist: SIGINT: saving after this iteration, ").unwrap();
    let when = when.strip_suffix("; again to quit without saving\n").unwrap();
    assert!(when == "in a moment" || when.starts_with("about ") && when.ends_with('s'), "{said}");
    assert_eq!(training.newest_logged(), logged, "it waited for the end of the iteration");
    run.says(&format!("SIGINT: saved update {} of {UPDATES} in ", logged + 1));
    assert_eq!(run.ends(), EXIT_RESTART);
}

/// The terminal is gone, and what is said goes nowhere; under nohup it may go.
#[test]
fn a_closed_terminal_makes_a_run_save_and_leave() {
    let _alone = alone();
    let training = Training::new(&[]);
    let mut run = Listened::start(&mut training.command(1, 1000 * UPDATES));
    run.says("update 1/");
    run.signal("HUP");
    run.said = None;
    assert_eq!(run.ends(), EXIT_RESTART);
    assert!(training.saved() >= Some(1));

    let command = training.command(1, 1000 * UPDATES);
    let mut nohup = Command::new("nohup");
    nohup.arg(command.get_program()).args(command.get_args());
    let mut run = Listened::start(&mut nohup);
    run.says("continues after update");
    run.signal("HUP");
    run.says("update ");
    run.signal("TERM");
    run.says("SIGTERM: saved update ");
    assert_eq!(run.ends(), EXIT_RESTART);
}

#[test]
fn a_signal_is_looked_at_while_a_run_folder_is_waited_for() {
    let training = Training::new(&[]);
    std::fs::create_dir(training.path(".running")).unwrap();
    let holder = r#"{"host":"n9","pid":1,"job":null,"machine":"another","started":1,"number":1,"sign_ms":1}"#;
    std::fs::write(training.path(".running/n9-1-1"), holder).unwrap();
    let mut run = Listened::start(&mut training.command(1, UPDATES));
    run.says("was last used by process 1 on n9: looking for up to 30 s whether it still is");
    run.signal("TERM");
    let since = Instant::now();
    run.says("SIGTERM: left ");
    assert_eq!(run.ends(), EXIT_RESTART);
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    let names = std::fs::read_dir(training.path("")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), [".running"]);
    assert_eq!(std::fs::read_to_string(training.path(".running/n9-1-1")).unwrap(), holder);
}

/// A signal that comes during a long evaluation is looked at after it, before anything is trained.
#[test]
fn a_signal_in_an_evaluation_is_looked_at_after_it() {
    let _alone = alone();
    let training = Training::new(&["run.eval_every=1", "eval.prompts=32"]);
    let mut job = Job::start(&mut training.command(2, UPDATES));
    job.until("the first update", TIMEOUT, || training.logged(1));
    std::thread::sleep(Duration::from_millis(200));
    job.signal("USR1");
    let output = job.finish(TIMEOUT);
    assert_eq!(output.code(), EXIT_RESTART, "{output}");
    assert_eq!(training.saved(), Some(1), "{output}");
    training.run(2, 2);
    assert_eq!(evaluations(&training.record()), [0, 1, 2], "each once");
}

/// The updates that were evaluated.
fn evaluations(record: &Record) -> Vec<u64> {
    let lines = record.metrics.iter().filter(|line| line["eval.images"].is_number());
    lines.map(|line| line["update"].as_u64().unwrap()).collect()
}

#[test]
fn a_second_run_in_the_same_folder_is_refused_and_the_first_is_not_disturbed() {
    let _alone = alone();
    let training = Training::new(&["run.checkpoint_every=1", "run.eval_every=0"]);
    let mut first = Job::start(&mut training.command(2, 1000 * UPDATES));
    first.until("the first checkpoint", TIMEOUT, || training.saved() >= Some(1));
    let file = std::fs::read_dir(training.path(".running")).unwrap().next().unwrap().unwrap().path();
    let holder: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let second = Job::start(&mut training.command(1, UPDATES)).finish(TIMEOUT);
    assert_eq!(second.code(), EXIT_USAGE, "{second}");
    let who = format!("process {} on {}", holder["pid"], holder["host"].as_str().unwrap());
    assert!(second.stderr.contains(&format!("{who} is training in it; end that run")), "{second}");
    first.signal("USR1");
    let first = first.finish(TIMEOUT);
    assert_eq!(first.code(), EXIT_RESTART, "{first}");
    assert!(!first.stderr.contains("not saved"), "{first}");
    assert!(!training.path(".running").exists());
    let Record { metrics, state: (update, _), .. } = training.record();
    let updates: Vec<u64> = metrics.iter().filter_map(|line| line["iteration"].as_u64()).collect();
    assert_eq!(updates, (0..update).collect::<Vec<_>>());
}

/// Kills one rank as soon as `ready`; the other ends long before the deadline of ten minutes.
fn killed(training: &Training, rank: usize, what: &str, ready: impl Fn() -> bool) -> Output {
    let mut job = Job::start(&mut training.command(2, UPDATES));
    job.until(what, TIMEOUT, ready);
    let since = Instant::now();
    job.signal_rank("KILL", rank);
    let output = job.finish(TIMEOUT);
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}: {output}", since.elapsed());
    assert_eq!(output.code(), 128 + 9, "{output}");
    output.assert_no_leftovers();
    output
}

#[test]
fn a_run_whose_ranks_are_killed_ends_as_the_unbroken_one() {
    let _alone = alone();
    let unbroken = unbroken(2);
    let training = Training::new(&["run.checkpoint_every=1"]);
    let saving = |update: u64| {
        let prefix = format!(".writing-update_{update:08}");
        let names = std::fs::read_dir(training.path("checkpoints")).into_iter().flatten().flatten();
        names.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
    };
    // Before there is any checkpoint, while one is being saved, and while an iteration is under way.
    killed(&training, 1, "the log", || training.logged(0));
    assert_eq!(training.saved(), None);
    killed(&training, 0, "the second save", || saving(2) || training.saved() >= Some(2));
    assert!(training.saved() >= Some(1));
    killed(&training, 1, "the third save", || training.saved() >= Some(3));
    training.run(2, UPDATES);
    training.record().assert_equal(&unbroken);
}
