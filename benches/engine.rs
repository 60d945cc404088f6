//! What block-wise gradients cost in time: `cargo bench --bench engine` (RAYON_NUM_THREADS chooses threads).
//!
//! 12 blocks, 384 wide, 263 tokens, batch 4: the model that `cargo test --test memory` weighs. The ways take turns; medians
//! and their ratios to one graph of the whole model are printed, nothing is asserted.

#[path = "../tests/memory/blocks/mod.rs"]
mod blocks;

use blocks::{BATCH, block_wise, composed, inputs, monolithic, trained};
use flowrl_dist::Result;
use flowrl_dist::params::Trainable;
use std::time::Instant;

// As the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const REPETITIONS: usize = 5;

fn main() -> Result<()> {
    flowrl_dist::allocator::keep_freed_memory();
    eprintln!("{} threads, batch {BATCH}, median [range] of {REPETITIONS}", candle_core::utils::get_num_threads());
    let inputs = inputs()?;
    for trainable in [Trainable::Full, Trainable::Lora] {
        let (model, layout, params) = trained(trainable)?;
        let whole = || monolithic(&model, &params, &inputs).map(drop);
        let candle = || composed(&model, &params, &inputs).map(drop);
        let blocks = |each: usize| block_wise(&model, &params, &layout, &inputs, each).map(drop);
        let ways: [(&str, &dyn Fn() -> Result<()>); 5] = [
            ("one graph", &whole),
            ("one graph, candle's operations", &candle),
            ("block-wise, no checkpoints", &|| blocks(0)),
            ("block-wise, each second block", &|| blocks(2)),
            ("block-wise, each block", &|| blocks(1)),
        ];
        let mut seconds = [const { Vec::new() }; 5];
        for repetition in 0..=REPETITIONS {
            for ((_, way), seconds) in ways.iter().zip(&mut seconds) {
                let since = Instant::now();
                way()?;
                if repetition > 0 {
                    seconds.push(since.elapsed().as_secs_f64()); // the first one is for warmth
                }
            }
        }
        seconds.iter_mut().for_each(|s| s.sort_by(f64::total_cmp));
        for ((name, _), s) in ways.iter().zip(&seconds) {
            let ratio = s[REPETITIONS / 2] / seconds[0][REPETITIONS / 2];
            let (least, median, most) = (s[0], s[REPETITIONS / 2], s[REPETITIONS - 1]);
            eprintln!("{trainable:?}  {name:>30}  {median:6.2} s [{least:.2} - {most:.2}]  {ratio:.2}");
        }
    }
    Ok(())
}
