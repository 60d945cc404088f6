//! The sizes of JPEG files against Pillow's.

use candle_core::{Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::data::PromptSet;
use flowrl_dist::reward::{Reward, RewardConfig, build};

/// R = 255 x / (w - 1), G = 255 y / (h - 1), rounded down, and a coarse or a constant blue: `[1, 3, h, w]`.
fn pattern(h: usize, w: usize, coarse: bool) -> Result<Tensor> {
    let blue = |x: usize, y: usize| if coarse { ((7 * x + 13 * y) ^ (x * y)) % 256 } else { 128 };
    let channel = |c: usize| {
        let value = move |x: usize, y: usize| [x * 255 / (w - 1), y * 255 / (h - 1), blue(x, y)][c] as f32 / 255.0;
        (0..h).flat_map(move |y| (0..w).map(move |x| value(x, y)))
    };
    Ok(Tensor::from_iter((0..3).flat_map(channel), &Device::Cpu)?.reshape((1, 3, h, w))?)
}

fn rewards() -> Result<Vec<Box<dyn Reward>>> {
    let config = "[[reward]]\nname = \"jpeg-compressibility\"\n[[reward]]\nname = \"jpeg-incompressibility\"\n";
    let mut table: toml::Table = config.parse().expect("TOML");
    let configs: Vec<RewardConfig> = table.remove("reward").expect("rewards").try_into().expect("their keys");
    build(&configs, 1)
}

/// Bytes that Pillow 13.0.0 (libjpeg-turbo) writes at quality 95: (height, width, coarse, smooth). What the encoders
/// make of blocks past the picture's edge differs, so the sizes are equal where both sides are multiples of 16.
const PILLOW: [(usize, usize, usize, usize); 5] = [
    (24, 48, 1406, 924),
    (64, 64, 3266, 1362),
    (67, 43, 2831, 1327),
    (200, 260, 32968, 6347),
    (512, 512, 156513, 20979),
];

#[test]
fn sizes_are_those_of_pillow_in_kilobytes() -> Result<()> {
    let rewards = rewards()?;
    let prompts = ["a picture".to_string()].into_iter().collect::<PromptSet>().prompts;
    for (h, w, coarse, smooth) in PILLOW {
        for (is_coarse, bytes) in [(true, coarse), (false, smooth)] {
            let picture = pattern(h, w, is_coarse)?;
            let score = |i: usize| -> Result<f64> { Ok(rewards[i].score(&picture, &prompts)?[0].expect("a score")) };
            let (small, large) = (score(0)?, score(1)?);
            assert_eq!(small, -large);
            let most = if h % 16 == 0 && w % 16 == 0 { 0.0 } else { 0.06 * bytes as f64 };
            let off = (large * 1000.0 - bytes as f64).abs();
            assert!(off <= most + 1e-6, "{h} x {w}: {large} kB, Pillow {bytes} bytes");
        }
    }
    Ok(())
}

#[test]
fn a_score_depends_on_its_image_alone() -> Result<()> {
    let (a, b) = (pattern(64, 64, true)?, pattern(64, 64, false)?);
    let prompts = ["a".to_string(), "b".to_string()].into_iter().collect::<PromptSet>().prompts;
    let rewards = rewards()?;
    let both = rewards[0].score(&Tensor::cat(&[&a, &b], 0)?, &prompts)?;
    assert_eq!(both, [rewards[0].score(&a, &prompts[..1])?, rewards[0].score(&b, &prompts[1..])?].concat());
    assert!(both[1] > both[0], "the smooth picture is the more compressible: {both:?}");
    Ok(())
}
