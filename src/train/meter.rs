//! What an iteration costs: seconds and bytes by phase, joined with its numbers into the metrics of
//! each update.

use crate::comm::{World, phase};
use crate::device;
use crate::error::Result;
use crate::observe::Metrics;
use candle_core::Device;
use std::time::Instant;

/// The phases whose bytes are counted together, under `sent.NAME`: those that the plan foretells.
const SENT: [(&str, &[&str]); 3] = [
    ("rollout", &["sample", "decode"]),
    ("update", &["train", "reduce", "optimizer"]),
    ("old_policy", &["old_policy"]),
];

/// The time and the bytes of an iteration's phases, and its metrics.
pub(super) struct Meter<'a> {
    world: World,
    on_phase: &'a mut dyn FnMut(&'static str),
    begun: Instant,
    current: Option<(&'static str, Mark)>,
    phases: Vec<Phase>,
    /// What belongs to the iteration.
    pub shared: Metrics,
    updates: Vec<Metrics>,
}

/// When, and how many bytes this rank had sent.
struct Mark {
    at: Instant,
    sent: u64,
}

struct Phase {
    name: &'static str,
    seconds: f64,
    /// Since they were last taken.
    bytes: u64,
}

impl<'a> Meter<'a> {
    pub fn new(world: &World, on_phase: &'a mut dyn FnMut(&'static str)) -> Self {
        Self {
            world: world.clone(),
            on_phase,
            begun: Instant::now(),
            current: None,
            phases: Vec::new(),
            shared: Metrics::default(),
            updates: Vec::new(),
        }
    }

    /// Ends the phase before and begins this one: here, on the bar and in what a watchdog would
    /// say.
    pub fn phase(&mut self, name: &'static str) {
        self.stop();
        phase(name);
        (self.on_phase)(name);
        self.current = Some((name, Mark { at: Instant::now(), sent: self.world.sent() }));
    }

    fn stop(&mut self) {
        let Some((name, since)) = self.current.take() else { return };
        let (seconds, bytes) = (since.at.elapsed().as_secs_f64(), self.world.sent() - since.sent);
        match self.phases.iter_mut().find(|phase| phase.name == name) {
            Some(phase) => (phase.seconds, phase.bytes) = (phase.seconds + seconds, phase.bytes + bytes),
            None => self.phases.push(Phase { name, seconds, bytes }),
        }
    }

    /// The bytes of what is counted together under this name, which are then counted anew.
    fn take_sent(&mut self, group: &str) -> f64 {
        let members = SENT.iter().find(|(name, _)| *name == group).map_or(&[][..], |(_, members)| members);
        let phases = self.phases.iter_mut().filter(|phase| members.contains(&phase.name));
        phases.map(|phase| std::mem::take(&mut phase.bytes)).sum::<u64>() as f64
    }

    /// Ends an update: with its metrics, or without any where it was left out.
    pub fn end_update(&mut self, metrics: Option<Metrics>) {
        self.stop();
        let sent = self.take_sent("update");
        if let Some(mut metrics) = metrics {
            metrics.set("sent.update", sent);
            self.updates.push(metrics);
        }
    }

    /// The metrics of each update, with those of the iteration before them; joined over the ranks.
    /// Collective.
    pub fn finish(mut self, iteration: u64, device: &Device) -> Result<Vec<Metrics>> {
        self.stop();
        for group in ["rollout", "old_policy"] {
            let sent = self.take_sent(group);
            self.shared.set(&format!("sent.{group}"), sent);
        }
        for Phase { name, seconds, .. } in &self.phases {
            self.shared.max(&format!("time.{name}"), *seconds);
        }
        self.shared.max("time.total", self.begun.elapsed().as_secs_f64());
        if let Some(gigabytes) = device::memory(device)? {
            self.shared.max("memory.gpu_gb", gigabytes);
        }
        self.shared.reduce(&*self.world.host)?;
        let mut joined = Vec::with_capacity(self.updates.len());
        for mut metrics in self.updates {
            metrics.reduce(&*self.world.host)?;
            let mut all = Metrics::default();
            all.set("iteration", iteration as f64);
            self.shared.iter().chain(metrics.iter()).for_each(|(name, value)| all.set(name, value));
            joined.push(all);
        }
        Ok(joined)
    }
}
