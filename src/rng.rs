//! Counter-based random numbers: the same for every world size, batch split and thread count.
//!
//! A stream is named by what it is for ([`Purpose`], iteration, prompt, image, index), never by a rank or by how many
//! numbers were drawn before. Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) turns
//! the name and a block counter into bits: seed and purpose are its key, coordinates and block its counter, each in bits
//! of its own, so that no two names meet. Box-Muller in f64, with `libm` so that every platform agrees, gives normals.

use rayon::prelude::*;

/// Number of the way in which names become streams. A run is continued with the streams that it began with: a checkpoint
/// of another number is read, but no run goes on from it. 1 was Philox4x32-10, in which purposes and iterations met.
pub const STREAMS: u32 = 2;

/// What a stream of random numbers is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// The starting noise of a rollout.
    Rollout = 1,
    /// The noise of a training point.
    TrainNoise = 2,
    /// Which rollout timesteps an image is trained at.
    TrainTimesteps = 3,
    /// In which optimizer update an image is used.
    TrainOrder = 4,
    /// Which prompts an iteration draws.
    Prompts = 5,
    /// The starting noise of an evaluation: the same in every evaluation.
    Evaluation = 6,
    /// Initial parameters.
    Parameters = 7,
    /// Supervised pretraining: prompts, styles, times and noise.
    Pretrain = 8,
    /// Which prompts supervised pretraining looks at.
    PretrainLooks = 9,
    /// Prompts in the manner of GenEval.
    GenEval = 10,
}

/// One named stream of random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// Seed and purpose.
    key: [u64; 2],
    /// The coordinates; the last word holds two.
    name: [u64; 3],
}

impl Stream {
    /// The stream of `seed` for `purpose` with up to four coordinates (iteration, prompt, image, index; 0 where unused).
    ///
    /// # Panics
    /// If one of the last two is 2^32 or more; images and solver steps are bounded far below.
    pub fn new(seed: u64, purpose: Purpose, [iteration, prompt, image, index]: [u64; 4]) -> Self {
        assert!(image >> 32 == 0 && index >> 32 == 0, "image {image} and index {index} share a word of the name");
        Self { key: [seed, purpose as u64], name: [iteration, prompt, image | index << 32] }
    }

    /// Block `block` of the stream: four independent words.
    fn block(&self, block: u64) -> [u64; 4] {
        let [iteration, prompt, image_and_index] = self.name;
        philox([block, iteration, prompt, image_and_index], self.key)
    }

    /// The `index`-th word of the stream (a block holds four).
    pub fn word(&self, index: u32) -> u64 {
        self.block(u64::from(index / 4))[index as usize % 4]
    }

    /// The `index`-th uniform number in [0, 1).
    pub fn uniform(&self, index: u32) -> f64 {
        (self.word(index) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// The `index`-th integer in `0..n`, n > 0 (multiply-shift; the bias is below n / 2^64).
    pub fn below(&self, index: u32, n: usize) -> usize {
        ((u128::from(self.word(index)) * n as u128) >> 64) as usize
    }

    /// The first `n` standard normal numbers.
    pub fn normals(&self, n: usize) -> Vec<f32> {
        const BLOCKS: usize = 1 << 13; // of a thread's piece
        let mut out = vec![0f32; n];
        out.par_chunks_mut(8 * BLOCKS).enumerate().for_each(|(piece, part)| {
            for (i, values) in part.chunks_mut(8).enumerate() {
                let normals = self.block((piece * BLOCKS + i) as u64).map(box_muller);
                values.copy_from_slice(&normals.as_flattened()[..values.len()]);
            }
        });
        out
    }

    /// A permutation of `0..n` (Fisher-Yates).
    pub fn permutation(&self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below((n - 1 - i) as u32, i + 1));
        }
        order
    }
}

/// Two independent standard normal numbers from the halves of a word.
fn box_muller(word: u64) -> [f32; 2] {
    let (low, high) = (word as u32, (word >> 32) as u32);
    let u = (f64::from(low) + 0.5) / 4294967296.0; // in (0, 1): the logarithm is finite
    let angle = std::f64::consts::TAU * f64::from(high) / 4294967296.0;
    let radius = libm::sqrt(-2.0 * libm::log(u));
    [(radius * libm::cos(angle)) as f32, (radius * libm::sin(angle)) as f32]
}

/// Philox4x64 with ten rounds.
fn philox(mut counter: [u64; 4], mut key: [u64; 2]) -> [u64; 4] {
    for _ in 0..10 {
        let low = 0xD2E7470EE14C6C93u128 * u128::from(counter[0]);
        let high = 0xCA5A826395121157u128 * u128::from(counter[2]);
        counter = [
            (high >> 64) as u64 ^ counter[1] ^ key[0],
            high as u64,
            (low >> 64) as u64 ^ counter[3] ^ key[1],
            low as u64,
        ];
        key = [key[0].wrapping_add(0x9E3779B97F4A7C15), key[1].wrapping_add(0xBB67AE8584CAA73B)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the Random123 distribution (kat_vectors, philox4x64 10), which NumPy's Philox gives too.
    #[test]
    fn philox_gives_the_known_answers() {
        let all = u64::MAX;
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x16554d9eca36314c, 0xdb20fe9d672d0fdc, 0xd7e772cee186176b, 0x7e68b68aec7ba23b]
        );
        assert_eq!(
            philox([all; 4], [all; 2]),
            [0x87b092c3013fe90b, 0x438c3c67be8d0224, 0x9cc7d7c69cd777b6, 0xa09caebf594f0ba0]
        );
        assert_eq!(
            philox(
                [0x243f6a8885a308d3, 0x13198a2e03707344, 0xa4093822299f31d0, 0x082efa98ec4e6c89],
                [0x452821e638d01377, 0xbe5466cf34e90c6c]
            ),
            [0xa528f45403e61d95, 0x38c72dbd566e9788, 0xa5a1610e72fd18b5, 0x57bd43b5e52b7fe6]
        );
    }

    #[test]
    fn normals_have_the_moments_of_a_gaussian() {
        let x = Stream::new(1, Purpose::Rollout, [3, 1, 4, 1]).normals(400_000);
        let n = x.len() as f64;
        let moment = |p: i32| x.iter().map(|&v| f64::from(v).powi(p)).sum::<f64>() / n;
        // Standard errors: sqrt(1/n), sqrt(2/n), sqrt(15/n), sqrt(96/n); five of them each.
        assert!(moment(1).abs() < 5.0 * (1.0 / n).sqrt());
        assert!((moment(2) - 1.0).abs() < 5.0 * (2.0 / n).sqrt());
        assert!(moment(3).abs() < 5.0 * (15.0 / n).sqrt());
        assert!((moment(4) - 3.0).abs() < 5.0 * (96.0 / n).sqrt());
    }

    #[test]
    fn normals_are_the_stream_in_order_however_many_there_are() {
        let stream = Stream::new(1, Purpose::Parameters, [2, 0, 0, 0]);
        let all = stream.normals(150_003);
        for index in [0, 1, 8_191, 8_192, 16_384, 18_749, 18_750] {
            let eight = stream.block(index as u64).map(box_muller).concat();
            let found = &all[8 * index..(8 * index + 8).min(all.len())];
            assert_eq!(found, &eight[..found.len()], "block {index}");
        }
        assert_eq!(stream.normals(7), all[..7]);
    }

    const PURPOSES: [Purpose; 10] = [
        Purpose::Rollout,
        Purpose::TrainNoise,
        Purpose::TrainTimesteps,
        Purpose::TrainOrder,
        Purpose::Prompts,
        Purpose::Evaluation,
        Purpose::Parameters,
        Purpose::Pretrain,
        Purpose::PretrainLooks,
        Purpose::GenEval,
    ];

    /// All words of the streams that a run can name here: seeds, purposes, iterations 0..64 and the largest, and numbers
    /// that differ from these by a bit or lie in the other half of a word. No two are alike, so no name is another's.
    #[test]
    fn no_two_names_meet() {
        let far = [u64::MAX, 1 << 32, 1 << 63];
        let mut seen = std::collections::HashMap::new();
        let mut count = 0;
        for (seed, purpose) in [0, 1, 2, 42, 1 << 32].into_iter().flat_map(|seed| PURPOSES.map(|p| (seed, p))) {
            for iteration in (0..64).chain(far) {
                for [prompt, image, index] in [
                    [0, 0, 0],
                    [1, 0, 0],
                    [0, 1, 0],
                    [0, 0, 1],
                    [far[1], 0, 0],
                    [7, 6, 5],
                    [far[0]; 3].map(|x| x >> 32),
                ] {
                    let stream = Stream::new(seed, purpose, [iteration, prompt, image, index]);
                    for word in 0..8 {
                        let name = (seed, purpose, iteration, prompt, image, index, word);
                        let other = seen.insert(stream.word(word), name);
                        assert!(other.is_none(), "{name:?} and {other:?}");
                        count += 1;
                    }
                }
            }
        }
        assert_eq!(seen.len(), count);
        // These met while purpose and iteration shared a word: 6 = 1 ^ 7.
        let [rollout, evaluation] = [(Purpose::Rollout, 7), (Purpose::Evaluation, 0)]
            .map(|(purpose, iteration)| Stream::new(42, purpose, [iteration, 5, 3, 0]).normals(16));
        assert_ne!(rollout, evaluation);
    }

    /// A block far past 2^32 is no earlier one again.
    #[test]
    fn blocks_do_not_come_again() {
        let stream = Stream::new(7, Purpose::Rollout, [1, 2, 3, 4]);
        assert_eq!(stream.word(9), stream.block(2)[1]);
        assert_ne!(stream.block(5), stream.block(5 + (1 << 32)));
    }

    #[test]
    #[should_panic(expected = "share a word")]
    fn a_coordinate_that_does_not_fit_is_no_other_one() {
        Stream::new(7, Purpose::Rollout, [0, 0, 1 << 32, 0]);
    }

    #[test]
    fn permutations_hold_every_number_once_and_are_uniform() {
        let mut counts = [[0u32; 4]; 4];
        for i in 0..4000 {
            let p = Stream::new(5, Purpose::Prompts, [i, 0, 0, 0]).permutation(4);
            let mut sorted = p.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3]);
            p.iter().enumerate().for_each(|(place, &value)| counts[place][value] += 1);
        }
        // 1000 expected in each cell, standard deviation 27.
        assert!(counts.iter().flatten().all(|&c| (865..1135).contains(&c)), "{counts:?}");
    }
}
