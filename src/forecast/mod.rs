//! How long a run will take on a machine, from the geometry of its plan: counted work over measured speeds.

mod calibrate;
mod machine;
mod memory;
mod work;

pub use calibrate::calibrate;
pub use machine::{Compute, Machine, Network};
pub use memory::Memory;
pub use work::{Links, Work};

use crate::config::RunConfig;
use crate::error::Result;
use crate::plan::Plan;
use serde::Serialize;
use std::fmt;

/// Seconds of an iteration's phases on the slowest rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Forecast {
    /// The machine.
    pub machine: String,
    /// R, and on how many nodes.
    pub ranks: (usize, usize),
    /// What a rank holds, and its device's memory.
    pub memory: Memory,
    /// Rollouts.
    pub sample: f64,
    /// Decoding.
    pub decode: f64,
    /// Scoring.
    pub reward: f64,
    /// Forward and backward passes.
    pub train: f64,
    /// What the ranks send, as if nothing of it ran beside the passes.
    pub communicate: f64,
    /// AdamW, EMA and old policy.
    pub optimizer: f64,
    /// All of it.
    pub iteration: f64,
    /// The run, without evaluations and checkpoints.
    pub run: f64,
    /// Images a second over all ranks.
    pub images_per_s: f64,
}

impl Forecast {
    /// Of a run on `plan.ranks` ranks, `per_node` on a node.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] where what a rank holds does not fit into its device.
    pub fn new(config: &RunConfig, plan: &Plan, machine: &Machine, per_node: usize) -> Result<Self> {
        let work = Work::new(config, plan)?;
        let on_node = per_node.min(plan.ranks);
        // Ranks beyond a node's devices take turns.
        let share = (machine.devices as f64 / on_node as f64).min(1.0);
        let memory = Memory::new(plan, machine, share)?;
        let (compute, network) = (&machine.compute, &machine.network);
        let one = on_node == plan.ranks;
        let bandwidth = 1e9 * if one { network.intra_gb_s } else { network.intra_gb_s.min(network.inter_gb_s) };
        // A ring of many ranks would wait for every hop; libraries go over to trees, whose depth is a logarithm.
        let hops = 2.0 * (plan.ranks as f64).log2().ceil();
        let sample = work.sample / (1e12 * compute.sample_tflops * share);
        let train = work.train / (1e12 * compute.train_tflops * share);
        let decode = work.images * compute.decode_s / share;
        let reward = work.images * compute.reward_s / share;
        let optimizer = work.optimizer / (1e9 * compute.optimizer_gb_s * share);
        let communicate = work.sent / bandwidth + work.calls * hops * network.latency_us * 1e-6;
        let iteration = sample + decode + reward + train + communicate + optimizer;
        Ok(Self {
            machine: machine.name.clone(),
            ranks: (plan.ranks, plan.ranks.div_ceil(on_node)),
            memory,
            sample,
            decode,
            reward,
            train,
            communicate,
            optimizer,
            iteration,
            run: iteration * plan.iterations as f64,
            images_per_s: plan.images as f64 / iteration,
        })
    }
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ranks, nodes) = self.ranks;
        let rows = [
            ("machine", format!("{ranks} ranks on {nodes} x {}", self.machine)),
            ("memory of a device", self.memory.to_string()),
            (
                "an iteration",
                format!(
                    "{} = sample {} + decode {} + reward {} + train {} + communicate {} + optimizer {}",
                    seconds(self.iteration),
                    seconds(self.sample),
                    seconds(self.decode),
                    seconds(self.reward),
                    seconds(self.train),
                    seconds(self.communicate),
                    seconds(self.optimizer)
                ),
            ),
            ("the run", format!("{}, {:.2} images a second", seconds(self.run), self.images_per_s)),
        ];
        for (name, value) in rows {
            writeln!(f, "{name:>24}  {value}")?;
        }
        Ok(())
    }
}

/// A duration with about three digits.
fn seconds(value: f64) -> String {
    match value {
        v if v >= 7200.0 => format!("{:.1} h", v / 3600.0),
        v if v >= 120.0 => format!("{:.1} min", v / 60.0),
        v if v >= 1.0 => format!("{v:.2} s"),
        v => format!("{:.1} ms", v * 1e3),
    }
}

#[cfg(test)]
mod tests;
