//! A plan as a person reads it.

use super::{Plan, Traffic};
use std::fmt;

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
        let range = |(least, most): (usize, usize)| match least == most {
            true => most.to_string(),
            false => format!("{least} to {most}"),
        };
        let geometry = [
            ("ranks", self.ranks.to_string()),
            ("images an iteration", format!("{} = {} prompts x {}", self.images, self.prompts, self.images_per_prompt)),
            ("images a rank", format!("{}, of {} groups", range(self.images_per_rank), range(self.groups_per_rank))),
            (
                "rollout",
                format!(
                    "{} solver steps, {} micro-batches of {}",
                    self.solver_steps, self.rollout_micro_batches, self.micro_batch
                ),
            ),
            (
                "training points",
                format!("{:?} an iteration's updates, {} timesteps an image", self.points, self.timesteps),
            ),
            (
                "iterations",
                format!("{} in the run, {} an epoch of the prompts", self.iterations, self.iterations_per_epoch),
            ),
        ];
        let parameters =
            ("parameters", format!("{} ({} trained, {} a shard)", self.parameters, self.trainable, self.shard));
        let updates = self.updates_sent().map(|sent| mib(sent.bytes)).collect::<Vec<_>>().join(", ");
        let unaccumulated = mib(self.unaccumulated_bytes);
        let update = format!("{updates} (with an all-reduce a backward pass: {unaccumulated})");
        let sent = self.update_sent.iter().take(1).flatten();
        let sent = sent.map(|s| {
            let Traffic { bytes, calls } = s.traffic;
            let plural = if calls == 1 { "" } else { "s" };
            ("", format!("{:>12} {} of {} ({calls} call{plural})", mib(bytes), s.collective, s.what))
        });
        let (rollouts, old) = (mib(self.rollout_sent.bytes), mib(self.old_policy_sent.bytes));
        let seldom = [
            ("and an iteration", format!("{rollouts} for rollouts, {old} for the old policy")),
            ("and an evaluation", mib(self.eval_sent.bytes)),
        ];
        let items = self.memory.iter().map(|item| ("", format!("{:>12} {}", mib(item.bytes), item.name)));
        // What a run without [[stage]] has is told already.
        let stages = self.stages.iter().filter(|_| self.stages.len() > 1).map(|stage| ("", stage.to_string()));
        let rows = geometry.into_iter().chain(stages).chain([parameters]);
        let rows = rows.chain([("sent a rank and update", update)]).chain(sent).chain(seldom);
        let notes = self.notes.iter().map(|note| ("note", note.clone()));
        let rows =
            rows.chain([("memory a rank", format!("{} and activations:", mib(self.held())))]).chain(items).chain(notes);
        for (name, value) in rows {
            writeln!(f, "{name:>24}  {value}")?;
        }
        Ok(())
    }
}
