//! Where the run is and when it will be done: a bar on a terminal, now and then a plain line in a pipe.

use super::{Metrics, Terminal};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Updates that the estimate of the rate looks back on.
const WINDOW: usize = 20;
/// Least time between two plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Progress of a run, shown to a person. Silent unless enabled (on rank 0).
///
/// The estimate counts the time from the first [`Progress::phase`] to the end of every update; setup and evaluation
/// (announced with [`Progress::aside`]) do not count.
#[derive(Debug)]
pub struct Progress {
    enabled: bool,
    terminal: Terminal,
    bar: Option<ProgressBar>,
    pace: Pace,
    total: u64,
    done: u64,
    phase: String,
    reward: Option<f64>,
    last_line: Option<Instant>,
}

impl Progress {
    /// Progress towards `total_updates`.
    pub fn new(total_updates: u64, enabled: bool, terminal: &Terminal) -> Self {
        let bar = (enabled && terminal.is_interactive()).then(|| {
            let bar = terminal.bars().add(ProgressBar::new(total_updates));
            let style = ProgressStyle::with_template("{spinner:.cyan} {bar:24.cyan/dim} {pos}/{len}  {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━─"));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self {
            enabled,
            terminal: terminal.clone(),
            bar,
            pace: Pace::default(),
            total: total_updates,
            done: 0,
            phase: String::new(),
            reward: None,
            last_line: None,
        }
    }

    /// Says that `done` updates were made before this start (a resumed run).
    pub fn resume_at(&mut self, done: u64) {
        self.done = done;
        self.redraw();
    }

    /// Names the phase of an update that begins (`sample`, `reward`, `train`).
    pub fn phase(&mut self, name: &str) {
        self.pace.start();
        self.show_phase(name);
    }

    /// Names something that is not part of an update (`setup`, `evaluate`): its time does not count for the estimate.
    pub fn aside(&mut self, name: &str) {
        self.pace.stop();
        self.show_phase(name);
    }

    /// Update number `update` is done.
    pub fn update(&mut self, update: u64, metrics: &Metrics) {
        self.pace.lap();
        self.done = update;
        self.reward = metrics.reward().map(|(_, mean)| mean).or(self.reward);
        self.redraw();
        let due = self.last_line.is_none_or(|last| last.elapsed() >= PLAIN_EVERY) || update >= self.total;
        if self.enabled && self.bar.is_none() && due {
            self.terminal.line(&plain_line(update, self.total, metrics, self.pace.per_update()));
            self.last_line = Some(Instant::now());
        }
    }

    /// An evaluation after `update` updates is done; always a line of its own.
    pub fn evaluation(&mut self, update: u64, metrics: &Metrics) {
        self.pace.stop();
        if self.enabled {
            self.terminal.line(&evaluation_line(update, self.total, metrics));
        }
    }

    /// Tells the person something in a line of its own.
    pub fn note(&self, text: &str) {
        if self.enabled {
            self.terminal.line(text);
        }
    }

    /// Takes the bar away. Dropping does the same.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn show_phase(&mut self, name: &str) {
        self.phase.clear();
        self.phase.push_str(name);
        self.redraw();
    }

    fn redraw(&self) {
        let Some(bar) = &self.bar else { return };
        let mut parts = vec![self.phase.clone()];
        parts.extend(self.reward.map(|reward| format!("reward {reward:.3}")));
        parts.extend(pace_parts(self.total.saturating_sub(self.done), self.pace.per_update()));
        bar.set_position(self.done);
        bar.set_message(parts.join("  "));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Moving average of the time of an update.
#[derive(Debug, Default)]
struct Pace {
    started: Option<Instant>,
    laps: VecDeque<Duration>,
}

impl Pace {
    /// The clock runs from here, unless it runs already.
    fn start(&mut self) {
        self.started.get_or_insert_with(Instant::now);
    }

    /// The time since the last lap is forgotten.
    fn stop(&mut self) {
        self.started = None;
    }

    /// An update ends, and the next begins.
    fn lap(&mut self) {
        let now = Instant::now();
        if let Some(started) = self.started.replace(now) {
            self.push(now - started);
        }
    }

    fn push(&mut self, lap: Duration) {
        if self.laps.len() == WINDOW {
            self.laps.pop_front();
        }
        self.laps.push_back(lap);
    }

    fn per_update(&self) -> Option<Duration> {
        (!self.laps.is_empty()).then(|| self.laps.iter().sum::<Duration>() / self.laps.len() as u32)
    }
}

/// `update 12/60  reward 0.412  loss 0.0123  1.9s/update  ETA 1m 31s`
fn plain_line(update: u64, total: u64, metrics: &Metrics, per_update: Option<Duration>) -> String {
    let mut parts = vec![format!("update {update}/{total}")];
    parts.extend(metrics.reward().map(|(_, reward)| format!("reward {reward:.3}")));
    parts.extend(metrics.get("loss").map(|loss| format!("loss {loss:.4}")));
    parts.extend(pace_parts(total.saturating_sub(update), per_update));
    parts.join("  ")
}

/// `update 10/60  eval reward.ocr.mean 0.520  exact 0.310  (12s)`
fn evaluation_line(update: u64, total: u64, metrics: &Metrics) -> String {
    let shown = |name: &&str| name.starts_with("eval.") && *name != "eval.images";
    let values: Vec<_> = metrics
        .iter()
        .filter(|(name, _)| shown(name))
        .map(|(name, value)| format!("{} {value:.3}", &name["eval.".len()..]))
        .collect();
    let took = metrics.get("time.eval").map(|seconds| format!("  ({})", in_words(seconds))).unwrap_or_default();
    format!("update {update}/{total}  eval {}{took}", values.join("  "))
}

/// The rate and, while updates are left, the time to the end.
fn pace_parts(left: u64, per_update: Option<Duration>) -> Vec<String> {
    let Some(per_update) = per_update else { return Vec::new() };
    let seconds = per_update.as_secs_f64();
    let rate = if seconds < 10.0 { format!("{seconds:.1}s/update") } else { format!("{seconds:.0}s/update") };
    let mut parts = vec![rate];
    if left > 0 {
        parts.push(format!("ETA {}", in_words(seconds * left as f64)));
    }
    parts
}

/// Seconds as `42s`, `1m 31s`, `2h 05m`, `3d 04h`.
pub(crate) fn in_words(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m {:02}s", s / 60, s % 60),
        3600..86400 => format!("{}h {:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d {:02}h", s / 86400, s % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_read_like_this() {
        let mut metrics = Metrics::default();
        metrics.set("iteration", 12.0);
        metrics.add_mean("reward.ocr.mean", 0.41234, 96.0);
        metrics.set("loss", 0.012345);
        assert_eq!(
            plain_line(12, 60, &metrics, Some(Duration::from_millis(1900))),
            "update 12/60  reward 0.412  loss 0.0123  1.9s/update  ETA 1m 31s"
        );
        assert_eq!(plain_line(60, 60, &Metrics::default(), Some(Duration::from_secs(11))), "update 60/60  11s/update");

        let mut eval = Metrics::default();
        eval.set("eval.reward.ocr.mean", 0.52);
        eval.set("eval.exact", 0.31);
        eval.set("eval.images", 256.0);
        eval.set("time.eval", 12.2);
        assert_eq!(evaluation_line(10, 60, &eval), "update 10/60  eval reward.ocr.mean 0.520  exact 0.310  (12s)");
    }

    #[test]
    fn pace_forgets_old_updates_and_everything_before_the_first_phase() {
        let mut pace = Pace::default();
        pace.lap(); // the clock was not running: setup
        assert_eq!(pace.per_update(), None);
        pace.push(Duration::from_secs(100));
        for _ in 0..WINDOW {
            pace.push(Duration::from_secs(2));
        }
        assert_eq!(pace.per_update(), Some(Duration::from_secs(2)));
    }

    #[test]
    fn durations_in_words() {
        let words: Vec<_> = [0.4, 59.6, 3600.0, 90_000.0].map(in_words).into();
        assert_eq!(words, ["0s", "1m 00s", "1h 00m", "1d 01h"]);
    }
}
