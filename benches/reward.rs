//! Images a second of each reward that needs no files, on one core; of the OCR with a detector if DETECTOR names it, and of a
//! model of the CLIP family, as PickScore, for each folder in CLIP (folders of transformers, separated as in PATH).
//!
//!     RAYON_NUM_THREADS=1 cargo bench --bench reward

use candle_core::{Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::data::{Prompt, PromptSet};
use flowrl_dist::reward::preprocess::Preprocess;
use flowrl_dist::reward::{ColourMatch, Jpeg, Ocr, Reward, RewardConfig, RewardKind, build, to_rgb8};
use std::io::Write;
use std::time::Instant;

// As the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `[B, 3, H, W]`: waves with some noise.
fn images(count: usize, height: usize, width: usize) -> Result<Tensor> {
    let value =
        |i: usize| 0.5 + 0.4 * (i as f32 / 97.0).sin() + 0.1 * ((i * 2_654_435_761 % 1000) as f32 / 1000.0 - 0.5);
    let values: Vec<f32> = (0..count * 3 * height * width).map(value).collect();
    Ok(Tensor::from_vec(values, (count, 3, height, width), &Device::Cpu)?)
}

fn measure(what: &str, count: usize, work: impl Fn() -> Result<()>) -> Result<()> {
    work()?;
    let times = (0..5).map(|_| -> Result<f64> {
        let begun = Instant::now();
        work()?;
        Ok(begun.elapsed().as_secs_f64())
    });
    let mut times = times.collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    let median = times[2] / count as f64;
    writeln!(std::io::stdout(), "{what:<28} {:>8.1} images/s  {:>8.2} ms an image", 1.0 / median, 1e3 * median).ok();
    Ok(())
}

fn main() -> Result<()> {
    flowrl_dist::allocator::keep_freed_memory();
    let prompts = |count: usize| -> Vec<Prompt> {
        (0..count).map(|i| format!("\"{i:03}\" in red on yellow")).collect::<PromptSet>().prompts
    };
    let (small, large) = (images(16, 24, 48)?, images(4, 512, 512)?);
    let (few, many) = (prompts(4), prompts(16));
    let ocr = Ocr::new(1)?;
    measure("ocr, 24 x 48", 16, || ocr.score(&small, &many).map(drop))?;
    measure("colour, 24 x 48", 16, || ColourMatch.score(&small, &many).map(drop))?;
    measure("jpeg, 512 x 512", 4, || Jpeg::Compressibility.score(&large, &few).map(drop))?;
    let pictures = to_rgb8(&large)?;
    measure("to eight bits, 512 x 512", 4, || to_rgb8(&large).map(drop))?;
    for (name, preprocess) in
        [("Pillow", Preprocess::Pillow), ("tensor", Preprocess::Tensor), ("padded", Preprocess::Padded)]
    {
        measure(&format!("{name} 512 to 224"), 4, || preprocess.run(&pictures, 224).map(drop))?;
    }
    if let Some(detector) = std::env::var_os("DETECTOR") {
        let ocr = Ocr::with_detector(1, detector.as_ref())?;
        measure("ocr with detector, 512 x 512", 4, || ocr.score(&large, &few).map(drop))?;
    }
    for path in std::env::var_os("CLIP").iter().flat_map(std::env::split_paths) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clip_rewards/hf"); // any: it costs nothing
        let config = RewardConfig {
            path: Some(path),
            tokenizer: Some(tokenizer.into()),
            ..RewardConfig::new(RewardKind::PickScore)
        };
        let rewards = build(&[config], 1)?;
        let (image, prompt) = (large.narrow(0, 0, 1)?, &few[..1]);
        measure(&format!("{name}, 512 x 512"), 1, || rewards[0].score(&image, prompt).map(drop))?;
    }
    Ok(())
}
