//! How work is cut: a rank's share, the images of an update, micro-batches and their counts.

use std::ops::Range;

/// The part of `0..count` that a rank does: contiguous, sizes differing by one at most.
pub fn share(count: usize, rank: usize, world_size: usize) -> Range<usize> {
    rank * count / world_size..(rank + 1) * count / world_size
}

/// Images of a group of `images` that update `update` of `updates` trains on.
pub fn images_of_update(images: usize, updates: usize, update: usize) -> usize {
    (images + updates - 1 - update) / updates
}

/// Images that a rank trains on in update `update` at most, however each group is split among the updates.
pub fn max_images_per_rank(prompts: usize, images: usize, updates: usize, update: usize, ranks: usize) -> usize {
    let of_group = images_of_update(images, updates, update);
    let of_rank = |rank| {
        let range = share(prompts * images, rank, ranks);
        let held =
            |group: usize| (group * images + images).min(range.end).saturating_sub(range.start.max(group * images));
        (range.start / images..range.end.div_ceil(images)).map(|group| held(group).min(of_group)).sum()
    };
    (0..ranks).map(of_rank).max().unwrap_or(0)
}

/// What micro-batches are made up to: `max_per_rank` samples where running the model is a collective call, so that all ranks
/// run it equally often; else none but a rank's own.
pub fn in_step(is_collective: bool, max_per_rank: usize) -> usize {
    if is_collective { max_per_rank } else { 0 }
}

/// A micro-batch: `len` samples from `start`, padded to `size` by repeating the last one.
///
/// Every micro-batch goes through the model with the same shape, so that a sample's value does not depend on how many
/// samples this rank has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MicroBatch {
    /// First sample.
    pub start: usize,
    /// Samples that count; none where only other ranks have more.
    pub len: usize,
    /// Samples with padding, B.
    pub size: usize,
}

impl MicroBatch {
    /// The sample at each of the B places.
    pub fn places(&self) -> impl Iterator<Item = usize> {
        let (start, end) = (self.start, (self.start + self.len).max(1));
        (0..self.size).map(move |i| (start + i).min(end - 1))
    }
}

/// Cuts `count` samples into micro-batches of `size`, and adds empty ones until there are as many as of
/// `max_per_rank` samples.
pub fn micro_batches(count: usize, size: usize, max_per_rank: usize) -> impl ExactSizeIterator<Item = MicroBatch> {
    (0..count.max(max_per_rank).div_ceil(size)).map(move |index| {
        let start = (index * size).min(count);
        MicroBatch { start, len: size.min(count - start), size }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    #[test]
    fn shares_cover_everything_once_and_evenly() {
        for (count, world_size) in [(10, 4), (3, 8), (512, 8), (0, 3)] {
            let shares: Vec<_> = (0..world_size).map(|r| share(count, r, world_size)).collect();
            assert!(shares.windows(2).all(|w| w[0].end == w[1].start));
            assert_eq!((shares[0].start, shares[world_size - 1].end), (0, count));
            let sizes = shares.iter().map(|s| s.len());
            assert!(sizes.clone().max().unwrap_or(0) - sizes.min().unwrap_or(0) <= 1);
        }
    }

    #[test]
    fn updates_share_a_group_evenly() {
        for (images, updates) in [(24, 2), (5, 3), (7, 7)] {
            let counts: Vec<usize> = (0..updates).map(|u| images_of_update(images, updates, u)).collect();
            assert_eq!(counts.iter().sum::<usize>(), images);
            assert!(counts.iter().all(|&c| c > 0));
        }
    }

    /// Every draw of a permutation for every group leaves no rank more than the bound, and the bound is reached.
    #[test]
    fn the_most_images_per_rank_of_an_update_are_known_beforehand() {
        for (prompts, images, updates, ranks) in [(3, 5, 1, 4), (3, 5, 2, 4), (3, 5, 2, 8), (2, 4, 3, 3), (4, 6, 2, 2)]
        {
            for update in 0..updates {
                let bound = max_images_per_rank(prompts, images, updates, update, ranks);
                let most = (0..1000) // the bound is met by a hundredth of the draws
                    .flat_map(|draw| {
                        let order = |group: usize| {
                            Stream::new(draw, Purpose::TrainOrder, [group as u64, 0, 0, 0]).permutation(images)
                        };
                        let orders: Vec<_> = (0..prompts).map(order).collect();
                        let taken = move |i: &usize| orders[i / images][i % images] % updates == update;
                        (0..ranks).map(move |rank| share(prompts * images, rank, ranks).filter(&taken).count())
                    })
                    .max();
                assert_eq!(most, Some(bound), "{prompts} x {images}, update {update} of {updates}, {ranks} ranks");
            }
        }
    }

    #[test]
    fn micro_batches_cover_every_sample_once_and_repeat_the_last() {
        let places = |count, max_per_rank| -> Vec<Vec<usize>> {
            micro_batches(count, 3, max_per_rank).map(|batch| batch.places().collect()).collect()
        };
        assert_eq!(places(7, 0), [[0, 1, 2], [3, 4, 5], [6, 6, 6]]);
        assert_eq!(places(4, 7), [[0, 1, 2], [3, 3, 3], [3, 3, 3]]);
        assert_eq!(places(0, 4), [[0, 0, 0], [0, 0, 0]]);
        assert!(places(0, 0).is_empty() && places(7, 9) == places(7, 0));
        assert_eq!(micro_batches(7, 3, 12).map(|b| b.len).collect::<Vec<_>>(), [3, 3, 1, 0]);
    }
}
