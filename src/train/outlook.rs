//! What the run is doing and how long that takes: what a person is told who asks it to leave.

use crate::observe::{Terminal, in_words};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What the run is doing, by when it looks at signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// Waiting for the run folder, loading, preparing.
    Start,
    Iteration,
    Evaluation,
    /// Writing the last checkpoint.
    Saving,
    /// All updates are done and saved: the last pictures.
    Finish,
}

/// The present work; on rank 0, which tells it.
#[derive(Clone)]
pub(super) struct Outlook(Option<Arc<Mutex<State>>>);

struct State {
    terminal: Terminal,
    work: Work,
    since: Instant,
    /// How long the last iteration and the last evaluation took.
    took: Vec<(Work, Duration)>,
}

impl Outlook {
    /// Before anything is done; told where `first`, which rank 0 is.
    pub fn new(first: bool) -> Self {
        let state =
            || State { terminal: Terminal::default(), work: Work::Start, since: Instant::now(), took: Vec::new() };
        Self(first.then(|| Arc::new(Mutex::new(state()))))
    }

    /// Tells it on this terminal from now on, beside its progress bar.
    pub fn show_on(&self, terminal: &Terminal) {
        self.change(|state| state.terminal = terminal.clone());
    }

    /// The work before ends, and this begins.
    pub fn begin(&self, work: Work) {
        self.change(|state| {
            state.took.retain(|&(done, _)| done != state.work);
            state.took.push((state.work, state.since.elapsed()));
            (state.work, state.since) = (work, Instant::now());
        });
    }

    /// Says what will come of a signal, and when.
    pub fn answer(&self, signal: &str) {
        self.change(|state| {
            let took = state.took.iter().find(|&&(work, _)| work == state.work).map(|&(_, took)| took);
            let line = words(signal, state.work, state.since.elapsed(), took);
            state.terminal.line(&format!("flowrl-dist: {line}"));
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        if let Some(state) = &self.0 {
            change(&mut state.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

/// "SIGINT: saving after this iteration, about 40s; again to quit without saving", of work that has been done for `since` and
/// `took` that long the last time.
fn words(signal: &str, work: Work, since: Duration, took: Option<Duration>) -> String {
    let when = match took.map(|took| took.saturating_sub(since)) {
        None => "it is the first, so it cannot be said how long it takes".into(),
        Some(left) if left < Duration::from_secs(1) => "in a moment".into(),
        Some(left) => format!("about {}", in_words(left.as_secs_f64())),
    };
    let what = match work {
        Work::Start => "leaving before anything is trained, as soon as the models are loaded".into(),
        Work::Iteration => format!("saving after this iteration, {when}"),
        Work::Evaluation => format!("saving after this evaluation, {when}"),
        Work::Saving => "saving already".into(),
        Work::Finish => "all updates are done and saved; ending with the last pictures".into(),
    };
    match (signal, work) {
        ("SIGINT", Work::Finish) => format!("{signal}: {what}; again to quit without them"),
        ("SIGINT", _) => format!("{signal}: {what}; again to quit without saving"),
        _ => format!("{signal}: {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_answered_with_what_is_known() {
        let s = Duration::from_secs;
        for (signal, work, since, took, said) in [
            (
                "SIGINT",
                Work::Iteration,
                s(20),
                Some(s(60)),
                "saving after this iteration, about 40s; again to quit without saving",
            ),
            ("SIGTERM", Work::Iteration, s(20), Some(s(60)), "saving after this iteration, about 40s"),
            ("SIGTERM", Work::Iteration, s(70), Some(s(60)), "saving after this iteration, in a moment"),
            (
                "SIGHUP",
                Work::Evaluation,
                s(1),
                None,
                "saving after this evaluation, it is the first, so it cannot be said how long it takes",
            ),
            ("SIGUSR1", Work::Evaluation, s(0), Some(s(3900)), "saving after this evaluation, about 1h 05m"),
            (
                "SIGTERM",
                Work::Start,
                s(5),
                None,
                "leaving before anything is trained, as soon as the models are loaded",
            ),
            (
                "SIGINT",
                Work::Finish,
                s(1),
                None,
                "all updates are done and saved; ending with the last pictures; again to quit without them",
            ),
        ] {
            assert_eq!(words(signal, work, since, took), format!("{signal}: {said}"));
        }
    }

    /// The time that counts is that of the last work of the same kind.
    #[test]
    fn kinds_of_work_have_times_of_their_own() {
        let outlook = Outlook::new(true);
        let took = |outlook: &Outlook| {
            let state = outlook.0.as_ref().unwrap().lock().unwrap();
            state.took.iter().map(|(work, _)| *work).collect::<Vec<_>>()
        };
        for work in [Work::Evaluation, Work::Iteration, Work::Iteration, Work::Evaluation, Work::Saving] {
            outlook.begin(work);
        }
        assert_eq!(took(&outlook), [Work::Start, Work::Iteration, Work::Evaluation]);
        Outlook::new(false).answer("SIGINT"); // says nothing
    }
}
