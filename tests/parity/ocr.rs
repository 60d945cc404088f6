//! The rewards of the embedded task against an independent runtime, clean renders, and cases worked out by hand.

use candle_core::{Device, IndexOp, Tensor};
use flowrl_dist::{
    advantage::{Score, Scores},
    data::{
        Prompt, PromptSet,
        glyphs::GlyphPrompt,
        render::{HEIGHT, Style, WIDTH, render},
    },
    reward::{
        ColourMatch, Ocr, Reward, RewardConfig, RewardKind, build, check_scores, colour_match, edit_reward,
        found_reward, to_rgb8,
    },
};
use std::path::PathBuf;

/// Fixtures of the same form elsewhere can be tried with `FLOWRL_FIXTURES`.
fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var_os("FLOWRL_FIXTURES").unwrap_or_else(|| "tests/fixtures".into());
    PathBuf::from(folder).join(name)
}

fn images(pictures: &[Vec<f32>]) -> Tensor {
    Tensor::from_vec(pictures.concat(), (pictures.len(), 3, HEIGHT, WIDTH), &Device::Cpu).unwrap()
}

fn prompts(texts: &[&str]) -> Vec<Prompt> {
    texts.iter().map(|text| text.to_string()).collect::<PromptSet>().prompts
}

/// Every 41st training prompt, the styles in turn, and the pictures.
fn clean_renders() -> (Vec<Prompt>, Tensor) {
    let prompts: Vec<Prompt> = PromptSet::train("glyphs").unwrap().prompts.into_iter().step_by(41).collect();
    let pictures: Vec<Vec<f32>> = prompts
        .iter()
        .zip(0..)
        .map(|(prompt, bits)| render(&GlyphPrompt::parse(&prompt.text).unwrap(), &Style::from_bits(bits)))
        .collect();
    (prompts, images(&pictures))
}

/// Uniform noise in [0, 1) from a linear congruential generator (Knuth's MMIX constants).
fn noise(count: usize, height: usize, width: usize) -> Tensor {
    let mut state = 1u64;
    let values: Vec<f32> = (0..count * 3 * height * width)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32
        })
        .collect();
    Tensor::from_vec(values, (count, 3, height, width), &Device::Cpu).unwrap()
}

/// The likeliest class of each step of `[T, 96]`.
fn labels(probabilities: &[f32]) -> Vec<usize> {
    let largest = |step: &[f32]| (0..step.len()).max_by(|&a, &b| step[a].total_cmp(&step[b])).unwrap();
    probabilities.chunks(96).map(largest).collect()
}

/// The fixture: `x` `[16, 3, 48, 96]`, preprocessed renders, and `y` `[16, 12, 96]`, onnxruntime's probabilities.
#[test]
fn ocr_parity_with_onnxruntime() {
    let tensors = candle_core::safetensors::load(fixture("ocr/ocr_fixture_16.safetensors"), &Device::Cpu).unwrap();
    let (x, y) = (&tensors["x"], &tensors["y"]);
    let ocr = Ocr::new(1).unwrap();
    let mut largest = 0f32;
    for i in 0..x.dim(0).unwrap() {
        let input = x.i(i).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let want = y.i(i).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let found = ocr.probabilities(&input, x.dim(3).unwrap()).unwrap();
        assert_eq!(found.len(), want.len());
        largest = found.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(largest, f32::max);
        assert_eq!(labels(&found), labels(&want), "picture {i}");
    }
    println!("largest difference to onnxruntime: {largest:.2e}");
    assert!(largest < 1e-4, "largest difference {largest}");
}

#[test]
fn clean_renders_read_as_their_text() {
    let (prompts, images) = clean_renders();
    let scores = Ocr::new(2).unwrap().score(&images, &prompts).unwrap();
    let exact = scores.iter().filter(|&&score| score == Some(1.0)).count();
    println!("{exact} of {} clean renders read exactly", scores.len());
    assert!(exact * 100 >= scores.len() * 95, "{exact} of {}", scores.len());
}

#[test]
fn short_words_read_as_their_text() {
    let words = ["Tiger", "cat", "River", "moon", "fish", "Tree", "h2o", "wolf"];
    let texts = words.map(|word| format!("\"{word}\" in black on white"));
    let pictures: Vec<Vec<f32>> = texts
        .iter()
        .zip([0, 1, 2].into_iter().cycle())
        .map(|(text, bits)| render(&GlyphPrompt::parse(text).unwrap(), &Style::from_bits(12 + bits)))
        .collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let scores = Ocr::new(1).unwrap().score(&images(&pictures), &prompts(&texts)).unwrap();
    let mean = scores.iter().map(|score| score.unwrap()).sum::<f64>() / words.len() as f64;
    assert!(mean > 0.9, "{scores:?}");
}

/// The recogniser reads a stray `.` or `e` in a few noise pictures of a hundred; it never earns a reward.
#[test]
fn noise_reads_as_nothing() {
    let (ocr, images) = (Ocr::new(2).unwrap(), noise(64, HEIGHT, WIDTH));
    let texts = ocr.read(&images).unwrap();
    let silent = texts.iter().filter(|text| text.is_empty()).count();
    assert!(silent >= 58, "{texts:?}");
    let scores = ocr.score(&images, &prompts(&["\"417\" in red on yellow"; 64])).unwrap();
    assert!(scores.iter().all(|&score| score == Some(0.0)), "{texts:?}");
}

/// Bit-equal whatever the neighbours and the thread count; several sizes of call, the images half noise to make the
/// probabilities unclear.
#[test]
fn a_reading_depends_on_nothing_but_its_image() {
    let (prompts, images) = clean_renders();
    let (count, prompts) = (9, &prompts[..9]);
    let images = images.i(..count).unwrap();
    let unclear = ((&images * 0.5).unwrap() + (noise(count, HEIGHT, WIDTH) * 0.5).unwrap()).unwrap();
    let (one, two) = (Ocr::new(1).unwrap(), Ocr::new(3).unwrap());
    let together = one.score(&unclear, prompts).unwrap();
    assert_eq!(together, two.score(&unclear, prompts).unwrap());
    for i in 0..count {
        assert_eq!(one.score(&unclear.i(i..i + 1).unwrap(), &prompts[i..=i]).unwrap(), together[i..=i]);
        let rest = two.score(&unclear.i(i..).unwrap(), &prompts[i..]).unwrap();
        assert_eq!(rest, together[i..]);
    }

    // Below the text, the probabilities themselves, for widths other than the usual too.
    for width in [48, 96, 200] {
        let input = (noise(1, 48, width) * 2.0).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let want: Vec<u32> = one.probabilities(&input, width).unwrap().iter().map(|p| p.to_bits()).collect();
        for ocr in [&one, &two] {
            let found: Vec<u32> = ocr.probabilities(&input, width).unwrap().iter().map(|p| p.to_bits()).collect();
            assert_eq!(found, want, "width {width}");
        }
    }
}

#[test]
fn a_picture_on_disk_scores_as_the_one_in_memory() {
    let prompt = GlyphPrompt::parse("\"417\" in red on yellow").unwrap();
    let picture = images(&[render(&prompt, &Style::from_bits(4))]);
    let unclear = ((&picture * 0.9).unwrap() + (noise(1, HEIGHT, WIDTH) * 0.3).unwrap()).unwrap(); // beyond 1 too
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.png");
    to_rgb8(&unclear).unwrap()[0].save(&path).unwrap();

    let read = image::open(&path).unwrap().to_rgb8();
    assert_eq!(read, to_rgb8(&unclear).unwrap()[0]);
    let values: Vec<f32> = read.into_raw().iter().map(|&value| f32::from(value) / 255.0).collect();
    let again = Tensor::from_vec(values, (1, HEIGHT, WIDTH, 3), &Device::Cpu).unwrap();
    let again = again.permute((0, 3, 1, 2)).unwrap(); // [1, 3, H, W]
    assert_eq!(to_rgb8(&again).unwrap(), to_rgb8(&unclear).unwrap());
}

#[test]
fn other_sizes_are_read_too() {
    let ocr = Ocr::new(1).unwrap();
    let prompt = GlyphPrompt::parse("\"417\" in black on white").unwrap();
    let picture = images(&[render(&prompt, &Style::from_bits(12))]);
    for (height, width) in [(48, 96), (96, 192), (48, 112), (24, 60)] {
        let resized = picture.interpolate2d(height, width).unwrap();
        assert_eq!(ocr.read(&resized).unwrap(), ["417"], "{height} x {width}");
    }
    let begun = std::time::Instant::now();
    for (height, width) in [(1, 1), (3, 500), (300, 2), (1, 4096)] {
        assert_eq!(ocr.read(&noise(1, height, width)).unwrap().len(), 1, "{height} x {width}");
    }
    // A strip is enlarged to the height that is read at; read in full, the last one would take a minute.
    assert!(begun.elapsed() < std::time::Duration::from_secs(15), "{:?}", begun.elapsed());
    assert!(ocr.read(&noise(1, 24, 48).i(0).unwrap()).is_err());
    assert!(ocr.read(&noise(2, 24, 48).i((.., ..1)).unwrap()).is_err());
}

#[test]
fn the_reward_counts_edits() {
    let reward = |prompt, read| edit_reward(prompt, read);
    assert_eq!(reward("\"417\" in red on yellow", "417"), Some(1.0));
    assert_eq!(reward("\"417\" in red on yellow", ""), Some(0.0));
    assert_eq!(reward("\"417\" in red on yellow", "41"), Some(1.0 - 1.0 / 3.0));
    assert_eq!(reward("\"417\" in red on yellow", "471"), Some(1.0 - 2.0 / 3.0));
    assert_eq!(reward("\"417\" in red on yellow", "4177"), Some(1.0 - 1.0 / 3.0));
    assert_eq!(reward("\"417\" in red on yellow", "999999"), Some(0.0));
    assert_eq!(reward("a sign that says \"Hello World\" and \"no\"", "hELLOworld"), Some(1.0));
    assert_eq!(reward("\"a b\"", " A  b "), Some(1.0));
    assert_eq!(reward("\"äöü\"", "äö"), Some(1.0 - 1.0 / 3.0));
    // With other text beside it the wanted one is still found; otherwise edits count.
    let found = |prompt, read| found_reward(prompt, read);
    assert_eq!(found("a sign \"Hello World\"", "OPEN hello world 24h"), Some(1.0));
    assert_eq!(found("a sign \"417\"", "41"), Some(1.0 - 1.0 / 3.0));
    assert_eq!(found("a sign \"417\"", "4 1 8 somewhere"), Some(0.0));
    assert_eq!(found("a cat", "cat"), None);
    for prompt in ["a cat", "an open \"quote", "an empty \"\" quote", "spaces \"  \" only"] {
        assert_eq!(reward(prompt, "cat"), None, "{prompt}");
    }
}

#[test]
fn the_colours_of_clean_renders_are_found() {
    let (prompts, images) = clean_renders();
    let found = colour_match(&images, &prompts).unwrap();
    let right = found.iter().filter(|&&right| right == Some((true, true))).count();
    println!("{right} of {} clean renders have both colours found", found.len());
    assert!(right * 100 >= found.len() * 98, "{right} of {}", found.len());
}

#[test]
fn the_colour_score_is_one_a_half_or_nothing() {
    let picture = render(&GlyphPrompt::parse("\"417\" in red on yellow").unwrap(), &Style::from_bits(0));
    let white = vec![1.0; 3 * HEIGHT * WIDTH];
    let cases = [
        ("\"417\" in red on yellow", &picture, Some(1.0)),
        ("\"002\" in red on yellow", &picture, Some(1.0)),
        ("\"417\" in blue on yellow", &picture, Some(0.5)),
        ("\"417\" in red on sky", &picture, Some(0.5)),
        ("\"417\" in blue on sky", &picture, Some(0.0)),
        ("a cat", &picture, None),
        ("\"417\" in white on black", &white, Some(0.0)),
        ("\"417\" in red on white", &white, Some(0.5)),
    ];
    let pictures: Vec<Vec<f32>> = cases.iter().map(|case| case.1.clone()).collect();
    let scores = ColourMatch.score(&images(&pictures), &prompts(&cases.map(|case| case.0))).unwrap();
    assert_eq!(scores, cases.map(|case| case.2));
}

#[test]
fn images_that_cannot_be_scored_are_refused() {
    let mut picture = vec![0.5; 3 * HEIGHT * WIDTH];
    picture[7] = f32::NAN;
    let two = images(&[vec![0.5; 3 * HEIGHT * WIDTH], picture]);
    let rewards = build(&[RewardKind::Ocr, RewardKind::Colour].map(RewardConfig::new), 1).unwrap();
    for reward in rewards {
        let error = reward.score(&two, &prompts(&["\"1\"", "\"2\""])).unwrap_err().to_string();
        assert_eq!(error, "image 1 has a pixel value of NaN; it cannot be scored");
        let error = reward.score(&two.i(..1).unwrap(), &prompts(&["\"1\"", "\"2\""])).unwrap_err().to_string();
        assert_eq!(error, format!("reward {}: 1 images for 2 prompts; pass one prompt an image", reward.name()));
    }
}

#[test]
fn rewards_are_built_from_their_configuration() {
    #[derive(serde::Deserialize)]
    struct Config {
        reward: Vec<RewardConfig>,
    }
    let parse = |text: &str| toml::from_str::<Config>(text).map(|config| config.reward);
    let configs = parse("[[reward]]\nname = \"ocr\"\n[[reward]]\nname = \"colour\"\nweight = 0.25").unwrap();
    assert_eq!(configs.iter().map(|config| config.weight).collect::<Vec<_>>(), [1.0, 0.25]);
    let names: Vec<String> = build(&configs, 1).unwrap().iter().map(|reward| reward.name().to_string()).collect();
    assert_eq!(names, ["ocr", "colour"]);

    assert!(parse("[[reward]]\nname = \"clip\"").unwrap_err().to_string().contains("expected one of `ocr`, `colour`"));
    assert!(
        parse("[[reward]]\nname = \"ocr\"\nwieght = 2").unwrap_err().to_string().contains("unknown field `wieght`")
    );
    let error = |text: &str| build(&parse(text).unwrap(), 1).err().unwrap().to_string();
    assert!(error("[[reward]]\nname = \"colour\"\nweight = nan").starts_with("reward colour: weight = NaN"));
    assert!(error("[[reward]]\nname = \"colour\"\n[[reward]]\nname = \"colour\"").contains("named twice"));
}

#[test]
fn scores_that_cannot_be_trained_on_are_refused_by_name() {
    let prompts = prompts(&["a", "b", "c"]);
    let reward = |name: &str, weight, scores: [Option<f64>; 3]| Scores::new(name, weight, scores);
    let ocr = reward("ocr", 2.0, [Some(0.5), None, Some(1.0)]);
    let colour = reward("colour", -1.0, [Some(0.25), Some(1.0), None]);
    check_scores(&[ocr.clone(), colour.clone()], &prompts).unwrap();
    let mut failed = ocr.clone();
    failed.scores[1] = Score::Failed;
    check_scores(&[failed], &prompts).unwrap();

    let error = |rewards: &[Scores]| check_scores(rewards, &prompts).unwrap_err().to_string();
    let broken = reward("colour", 1.0, [Some(0.25), Some(f64::INFINITY), None]);
    assert_eq!(error(&[ocr.clone(), broken]), "reward colour: score inf for image 1, prompt 1 \"b\"");
    assert!(error(std::slice::from_ref(&ocr)).starts_with("reward ocr: none applies to image 1, prompt 1 \"b\"; "));
    let watched = reward("colour", 0.0, [Some(1.0); 3]);
    assert!(error(&[ocr.clone(), watched]).starts_with("reward ocr: none applies to image 1, prompt 1 \"b\"; "));
    let short = Scores { scores: vec![Score::Value(1.0)], ..colour };
    assert!(error(&[ocr, short]).starts_with("reward colour: 1 images for 3 prompts"));
}
