//! Counter-based random numbers: the same for every world size, batch split and thread count.
//!
//! A stream is named by what it is for ([`Purpose`], iteration, prompt, image, index), never by a rank or by how many
//! numbers were drawn before. Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) turns
//! the name and a block counter into bits; Box-Muller in f64, with `libm` so that every platform agrees, into normals.

use rayon::prelude::*;

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
}

/// One named stream of random numbers.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    key: [u32; 2],
    id: [u32; 3],
}

impl Stream {
    /// The stream of `seed` for `purpose` with up to four coordinates (iteration, prompt, image, index; 0 where unused).
    pub fn new(seed: u64, purpose: Purpose, coordinates: [u64; 4]) -> Self {
        let key = [seed as u32, (seed >> 32) as u32];
        // The name is absorbed two words at a time; 96 bits of the result name the stream.
        let mut state = [purpose as u32, 0, 0, 0];
        for c in coordinates {
            state = philox([state[0] ^ c as u32, state[1] ^ (c >> 32) as u32, state[2], state[3]], key);
        }
        Self { key, id: [state[0], state[1], state[2]] }
    }

    /// Block `index` of the stream: four independent 32-bit words.
    fn block(&self, index: u32) -> [u32; 4] {
        philox([index, self.id[0], self.id[1], self.id[2]], self.key)
    }

    /// The `index`-th 64-bit word of the stream (a block holds two).
    pub fn word(&self, index: u32) -> u64 {
        let block = self.block(index / 2);
        let half = 2 * (index as usize % 2);
        u64::from(block[half]) | u64::from(block[half + 1]) << 32
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
        const BLOCKS: usize = 1 << 14; // of a thread's piece
        let mut out = vec![0f32; n];
        out.par_chunks_mut(4 * BLOCKS).enumerate().for_each(|(piece, part)| {
            for (i, values) in part.chunks_mut(4).enumerate() {
                let [a, b, c, d] = self.block((piece * BLOCKS + i) as u32);
                let [[a, b], [c, d]] = [box_muller(a, b), box_muller(c, d)];
                values.copy_from_slice(&[a, b, c, d][..values.len()]);
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

/// Two independent standard normal numbers from two words.
fn box_muller(a: u32, b: u32) -> [f32; 2] {
    let u = (f64::from(a) + 0.5) / 4294967296.0; // in (0, 1): the logarithm is finite
    let angle = std::f64::consts::TAU * f64::from(b) / 4294967296.0;
    let radius = libm::sqrt(-2.0 * libm::log(u));
    [(radius * libm::cos(angle)) as f32, (radius * libm::sin(angle)) as f32]
}

/// Philox4x32 with ten rounds.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let low = 0xD2511F53u64 * u64::from(counter[0]);
        let high = 0xCD9E8D57u64 * u64::from(counter[2]);
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [key[0].wrapping_add(0x9E3779B9), key[1].wrapping_add(0xBB67AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_gives_the_known_answers() {
        let all = u32::MAX;
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([all; 4], [all; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
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
        for index in [0, 1, 16_383, 16_384, 32_768, 37_499, 37_500] {
            let [a, b, c, d] = stream.block(index as u32);
            let four = [box_muller(a, b), box_muller(c, d)].concat();
            let found = &all[4 * index..(4 * index + 4).min(all.len())];
            assert_eq!(found, &four[..found.len()], "block {index}");
        }
        assert_eq!(stream.normals(7), all[..7]);
    }

    #[test]
    fn every_coordinate_names_another_stream() {
        let base = Stream::new(7, Purpose::Rollout, [1, 2, 3, 4]).word(0);
        assert_eq!(base, Stream::new(7, Purpose::Rollout, [1, 2, 3, 4]).word(0));
        for other in [
            Stream::new(8, Purpose::Rollout, [1, 2, 3, 4]),
            Stream::new(7, Purpose::TrainNoise, [1, 2, 3, 4]),
            Stream::new(7, Purpose::Rollout, [2, 2, 3, 4]),
            Stream::new(7, Purpose::Rollout, [1, 3, 3, 4]),
            Stream::new(7, Purpose::Rollout, [1, 2, 4, 4]),
            Stream::new(7, Purpose::Rollout, [1, 2, 3, 5]),
            Stream::new(7, Purpose::Rollout, [1, 2, 3 << 32, 4]),
        ] {
            assert_ne!(base, other.word(0));
        }
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
