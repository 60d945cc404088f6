//! Seconds of an iteration's phases.

use crate::comm::phase;
use crate::observe::Metrics;
use std::time::Instant;

/// Seconds of each phase; of several ranks, the slowest one's.
pub(super) struct Clock<'a> {
    on_phase: &'a mut dyn FnMut(&'static str),
    begun: Instant,
    current: Option<(&'static str, Instant)>,
    seconds: Vec<(&'static str, f64)>,
}

impl<'a> Clock<'a> {
    pub fn new(on_phase: &'a mut dyn FnMut(&'static str)) -> Self {
        Self { on_phase, begun: Instant::now(), current: None, seconds: Vec::new() }
    }

    /// Ends the phase before and begins this one: on the clock, on the bar and in what a watchdog would say.
    pub fn start(&mut self, name: &'static str) {
        self.stop();
        phase(name);
        (self.on_phase)(name);
        self.current = Some((name, Instant::now()));
    }

    fn stop(&mut self) {
        if let Some((name, since)) = self.current.take() {
            let seconds = since.elapsed().as_secs_f64();
            match self.seconds.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += seconds,
                None => self.seconds.push((name, seconds)),
            }
        }
    }

    pub fn report(mut self, metrics: &mut Metrics) {
        self.stop();
        self.seconds.iter().for_each(|(name, s)| metrics.max(&format!("time.{name}"), *s));
        metrics.max("time.total", self.begun.elapsed().as_secs_f64());
    }
}
