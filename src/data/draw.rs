//! Which prompts an iteration draws.

use super::{Prompt, PromptSet};
use crate::rng::{Purpose, Stream};
use std::collections::BTreeSet;

impl PromptSet {
    /// The `count` different prompts of iteration `iteration`, counted from 0 since the set came into use.
    ///
    /// Prompts are taken in an order that is drawn anew for each epoch. If fewer than `count` are left of an epoch, they are
    /// skipped, so that no prompt comes twice in an iteration. The result depends on the arguments alone: resuming needs no
    /// state. `stage` is the number of the stage that brought the set; with another one the order is another.
    ///
    /// # Panics
    /// If the set holds fewer than `count` prompts or count is 0; the plan has refused both.
    pub fn draw(&self, seed: u64, stage: usize, iteration: u64, count: usize) -> Vec<Prompt> {
        let per_epoch = (self.len() / count) as u64;
        let order = self.order(seed, stage, iteration / per_epoch);
        let start = (iteration % per_epoch) as usize * count;
        order[start..start + count].iter().map(|&i| self.prompts[i].clone()).collect()
    }

    /// The order in which an epoch goes through the set.
    fn order(&self, seed: u64, stage: usize, epoch: u64) -> Vec<usize> {
        Stream::new(seed, Purpose::Prompts, [epoch, stage as u64, 0, 0]).permutation(self.len())
    }

    /// The prompts that the first `iterations` iterations draw, each once.
    ///
    /// # Panics
    /// As [`PromptSet::draw`].
    pub fn drawn(&self, seed: u64, stage: usize, iterations: u64, count: usize) -> Vec<&Prompt> {
        let per_epoch = (self.len() / count) as u64;
        if iterations >= 8 * per_epoch {
            return self.prompts.iter().collect(); // as good as all
        }
        let of_epoch = |epoch| {
            let draws = per_epoch.min(iterations - epoch * per_epoch) as usize;
            self.order(seed, stage, epoch).into_iter().take(draws * count)
        };
        let drawn: BTreeSet<usize> = (0..iterations.div_ceil(per_epoch)).flat_map(of_epoch).collect();
        drawn.into_iter().map(|prompt| &self.prompts[prompt]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_draws_every_prompt_once_and_epochs_differ() {
        let set: PromptSet = (0..10).map(|i| i.to_string()).collect();
        let epoch = |stage: usize, e: u64| -> Vec<usize> {
            (0..5).flat_map(|i| set.draw(1, stage, 5 * e + i, 2)).map(|p| p.index).collect()
        };
        let mut first = epoch(0, 0);
        assert_ne!(first, epoch(0, 1));
        assert_ne!(first, epoch(1, 0));
        first.sort_unstable();
        assert_eq!(first, (0..10).collect::<Vec<_>>());
        // 10 prompts hold three draws of 3; the tenth is dropped.
        let drawn: Vec<usize> = (0..3).flat_map(|i| set.draw(1, 0, i, 3)).map(|p| p.index).collect();
        assert_eq!(drawn.iter().collect::<std::collections::BTreeSet<_>>().len(), 9);
        for iterations in 0..12 {
            let each: BTreeSet<usize> = (0..iterations).flat_map(|i| set.draw(1, 0, i, 3)).map(|p| p.index).collect();
            assert!(set.drawn(1, 0, iterations, 3).into_iter().map(|p| p.index).eq(each), "{iterations}");
        }
        assert_eq!(set.drawn(1, 0, 1000, 3).len(), 10);
    }
}
