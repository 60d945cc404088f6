//! What each reward takes an image, for a group of 24 images on one prompt: on the GPU where the build has one
//! (`--features cuda`), else on the CPU.
//!
//!     cargo bench --bench reward [-- [NAME ...] [IMAGES]]      RAYON_NUM_THREADS: threads on the CPU
//!
//! NAME is one of ocr, ocr-detector, colour, jpeg, clip-score, aesthetic, pick-score, hps, remote; without one all are
//! measured. IMAGES is another size of the group. Images are of 512 x 512 pixels, for ocr of 24 x 48. ocr-detector wants
//! the model that launch/fetch-ocr.sh fetches, in models/ocr or where DETECTOR says. The CLIP models have their real sizes,
//! random weights, and no prompt but one; they lie in a temporary folder (2 GB) while they are loaded. `remote` is
//! `colour` from a server of this program, in a thread of its own, asked as training asks it.

use candle_core::{Device, Tensor};
use flowrl_dist::data::glyphs::GlyphPrompt;
use flowrl_dist::data::render::{HEIGHT, Style, WIDTH, render};
use flowrl_dist::data::{Prompt, PromptSet};
use flowrl_dist::device::{DeviceChoice, select};
use flowrl_dist::reward::{
    AestheticConfig, ClipFiles, ClipScoreConfig, HpsConfig, Loader, OcrConfig, Overlap, PickScoreConfig, RemoteConfig,
    RewardConfig, RewardKind, Rewards, Scoring, serve,
};
use flowrl_dist::rng::{Purpose, Stream};
use flowrl_dist::{Error, Result};
use half::bf16;
use safetensors::{Dtype, View, serialize_to_file};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

// As the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const NAMES: [&str; 9] =
    ["ocr", "ocr-detector", "colour", "jpeg", "clip-score", "aesthetic", "pick-score", "hps", "remote"];
const SIDE: usize = 512;
/// Repetitions at most, and the time after which no other is begun.
const REPETITIONS: usize = 5;
const ENOUGH: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    flowrl_dist::allocator::keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let (numbers, names): (Vec<_>, Vec<_>) =
        arguments.into_iter().partition(|argument| argument.parse::<usize>().is_ok());
    if let Some(wrong) = names.iter().find(|name| !NAMES.contains(&name.as_str())) {
        return Err(Error::Usage(format!("{wrong}: must be one of {}", NAMES.join(", "))));
    }
    let images = numbers.first().and_then(|number| number.parse().ok()).unwrap_or(24);
    let (device, why) = select(DeviceChoice::Auto, 0, 1)?;
    let bench = Bench { device, images, threads: candle_core::utils::get_num_threads() };
    eprintln!("on {why}, {} threads, groups of {images} images; median [range] of the repetitions", bench.threads);
    eprintln!("| reward | ms an image | repetitions |\n|---|---|---|");
    for name in NAMES.into_iter().filter(|name| names.is_empty() || names.iter().any(|wanted| wanted == name)) {
        bench.row(name)?;
    }
    Ok(())
}

struct Bench {
    device: Device,
    /// Of a group.
    images: usize,
    threads: usize,
}

impl Bench {
    fn row(&self, name: &str) -> Result<()> {
        let large = pictures(self.images, SIDE, SIDE)?;
        let folder = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
        let files = |path: PathBuf| ClipFiles { path, tokenizer: Some(tokenizer()) };
        let folder = folder.path();
        let config = match name {
            "ocr" => {
                let small = pictures(self.images, HEIGHT, WIDTH)?;
                return self.measure(name, &RewardConfig::new(RewardKind::Ocr), &small, None);
            }
            "ocr-detector" => {
                let file = std::env::var_os("DETECTOR").unwrap_or("models/ocr/ch_PP-OCRv4_det_infer.onnx".into());
                if !Path::new(&file).is_file() {
                    eprintln!("| {name} | not measured: {file:?} is missing, launch/fetch-ocr.sh fetches it | |");
                    return Ok(());
                }
                RewardConfig::with(OcrConfig { detector: Some(file.into()) })
            }
            "colour" => RewardConfig::new(RewardKind::Colour),
            "jpeg" => RewardConfig::new(RewardKind::JpegCompressibility),
            "clip-score" => RewardConfig::with(ClipScoreConfig(files(VIT_L.write_transformers(folder)?))),
            "aesthetic" => RewardConfig::with(AestheticConfig {
                path: VIT_L.write_transformers(folder)?,
                tokenizer: Some(tokenizer()),
                predictor: write_predictor(folder)?,
            }),
            "pick-score" => RewardConfig::with(PickScoreConfig(files(VIT_H.write_transformers(folder)?))),
            "hps" => RewardConfig::with(HpsConfig(files(VIT_H.write_open_clip(folder)?))),
            _ => return self.remote(&large),
        };
        self.measure(name, &config, &large, Some(folder))
    }

    /// One reward on its images; the files of its model are deleted once it is loaded.
    fn measure(&self, name: &str, config: &RewardConfig, images: &Tensor, files: Option<&Path>) -> Result<()> {
        let rewards: Rewards = Loader::new(self.threads, &self.device).build(std::slice::from_ref(config))?.into();
        if let Some(folder) = files {
            std::fs::remove_dir_all(folder).map_err(Error::io(folder))?;
        }
        let prompts: Vec<Prompt> = std::iter::repeat_n(PROMPT.to_string(), self.images).collect::<PromptSet>().prompts;
        let score = |count: usize| -> Result<()> {
            let mut scoring = Scoring::new(&rewards, Overlap::Auto, &self.device)?;
            scoring.add(0, &images.narrow(0, 0, count)?, &prompts[..count])?;
            scoring.finish().map(drop)
        };
        // On the CPU the first image is as slow as the others, but for pages of memory.
        score(if self.device.is_cpu() { 1 } else { self.images })?;
        let (begun, mut times) = (Instant::now(), Vec::new());
        while times.len() < REPETITIONS && (times.is_empty() || begun.elapsed() < ENOUGH) {
            let since = Instant::now();
            score(self.images)?;
            times.push(1e3 * since.elapsed().as_secs_f64() / self.images as f64);
        }
        times.sort_by(f64::total_cmp);
        let (least, most) = (times[0], times[times.len() - 1]);
        eprintln!("| {name} | {:.2} [{least:.2}, {most:.2}] | {} |", times[times.len() / 2], times.len());
        Ok(())
    }

    fn remote(&self, images: &Tensor) -> Result<()> {
        let rewards = Loader::new(self.threads, &Device::Cpu).build(&[RewardConfig::new(RewardKind::Colour)])?;
        let (listener, address) = serve::listen("127.0.0.1:0", false)?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let remote = RemoteConfig { url: format!("http://{address}"), reward: "colour".into(), ..Default::default() };
        let config = RewardConfig::with(remote);
        std::thread::scope(|scope| {
            let server = scope.spawn(|| serve::serve(rewards.into(), listener, None, stopped));
            let measured = self.measure("remote", &config, images, None);
            stop.send(()).ok();
            let served = server.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            measured.and(served)
        })
    }
}

const PROMPT: &str = r#""417" in red on yellow"#;

/// `[count, 3, height, width]`: the prompt as a glyph picture, each in another style, in the middle of its own ground.
fn pictures(count: usize, height: usize, width: usize) -> Result<Tensor> {
    let prompt = GlyphPrompt::parse(PROMPT)?;
    let scale = (height / HEIGHT).min(width / WIDTH);
    let mut values = Vec::with_capacity(count * 3 * height * width);
    for style in 0..count as u64 {
        let glyphs = render(&prompt, &Style::from_bits(style)); // [3, HEIGHT, WIDTH]
        let place =
            |at: usize, all: usize, own: usize| (at.saturating_sub((all - scale * own) / 2) / scale).min(own - 1);
        for (channel, y) in (0..3).flat_map(|channel| (0..height).map(move |y| (channel, y))) {
            let row = (channel * HEIGHT + place(y, height, HEIGHT)) * WIDTH;
            values.extend((0..width).map(|x| glyphs[row + place(x, width, WIDTH)]));
        }
    }
    Ok(Tensor::from_vec(values, (count, 3, height, width), &Device::Cpu)?)
}

/// Any of CLIP's kind: it costs nothing.
fn tokenizer() -> PathBuf {
    let fixtures = std::env::var_os("FLOWRL_FIXTURES")
        .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
    fixtures.join("clip_rewards/hf")
}

/// One tower of a CLIP model.
struct Tower {
    width: usize,
    blocks: usize,
    heads: usize,
}

/// A CLIP model for pictures of 224 x 224 in patches of 14 x 14 and texts of 77 tokens.
struct Sizes {
    text: Tower,
    vision: Tower,
    features: usize,
    activation: &'static str,
}

/// openai/clip-vit-large-patch14.
const VIT_L: Sizes = Sizes {
    text: Tower { width: 768, blocks: 12, heads: 12 },
    vision: Tower { width: 1024, blocks: 24, heads: 16 },
    features: 768,
    activation: "quick_gelu",
};
/// yuvalkirstain/PickScore_v1 and HPS v2.1.
const VIT_H: Sizes = Sizes {
    text: Tower { width: 1024, blocks: 24, heads: 16 },
    vision: Tower { width: 1280, blocks: 32, heads: 16 },
    features: 1024,
    activation: "gelu",
};
const VOCABULARY: usize = 49408;

type Shapes = Vec<(String, Vec<usize>)>;

impl Sizes {
    /// As a folder of transformers'.
    fn write_transformers(&self, folder: &Path) -> Result<PathBuf> {
        let Sizes { text, vision, features, activation } = self;
        let tower = |tower: &Tower| {
            json!({
                "hidden_size": tower.width,
                "intermediate_size": 4 * tower.width,
                "num_hidden_layers": tower.blocks,
                "num_attention_heads": tower.heads,
                "hidden_act": activation,
                "projection_dim": features,
            })
        };
        let mut config = json!({"model_type": "clip", "projection_dim": features, "text_config": tower(text)});
        config["text_config"]["eos_token_id"] = 2.into();
        config["vision_config"] = tower(vision);
        config["vision_config"]["patch_size"] = 14.into();
        write_json(&folder.join("config.json"), &config)?;

        let mut shapes: Shapes = Vec::new();
        let mut add = |name: String, shape: &[usize]| shapes.push((name, shape.to_vec()));
        for (name, Tower { width: w, blocks, .. }) in [("text_model", text), ("vision_model", vision)] {
            let norms = match name {
                "text_model" => ["final_layer_norm"].as_slice(),
                _ => &["pre_layrnorm", "post_layernorm"],
            };
            for norm in norms {
                add(format!("{name}.{norm}.weight"), &[*w]);
                add(format!("{name}.{norm}.bias"), &[*w]);
            }
            for i in 0..*blocks {
                let parts = [("self_attn.q_proj", [*w, *w]), ("self_attn.k_proj", [*w, *w])];
                let parts = parts.into_iter().chain([("self_attn.v_proj", [*w, *w]), ("self_attn.out_proj", [*w, *w])]);
                for (part, shape) in parts.chain([("mlp.fc1", [4 * w, *w]), ("mlp.fc2", [*w, 4 * w])]) {
                    add(format!("{name}.encoder.layers.{i}.{part}.weight"), &shape);
                    add(format!("{name}.encoder.layers.{i}.{part}.bias"), &shape[..1]);
                }
                for (norm, part) in ["layer_norm1", "layer_norm2"].iter().flat_map(|n| [(n, "weight"), (n, "bias")]) {
                    add(format!("{name}.encoder.layers.{i}.{norm}.{part}"), &[*w]);
                }
            }
        }
        add("text_model.embeddings.token_embedding.weight".into(), &[VOCABULARY, text.width]);
        add("text_model.embeddings.position_embedding.weight".into(), &[77, text.width]);
        add("vision_model.embeddings.class_embedding".into(), &[vision.width]);
        add("vision_model.embeddings.patch_embedding.weight".into(), &[vision.width, 3, 14, 14]);
        add("vision_model.embeddings.position_embedding.weight".into(), &[257, vision.width]);
        add("text_projection.weight".into(), &[*features, text.width]);
        add("visual_projection.weight".into(), &[*features, vision.width]);
        add("logit_scale".into(), &[]);
        write_weights(&folder.join("model.safetensors"), shapes)?;
        Ok(folder.to_path_buf())
    }

    /// As a file of open_clip's.
    fn write_open_clip(&self, folder: &Path) -> Result<PathBuf> {
        let Sizes { text, vision, features, .. } = self;
        let mut shapes: Shapes = Vec::new();
        let mut add = |name: String, shape: &[usize]| shapes.push((name, shape.to_vec()));
        for (tower, norms, Tower { width: w, blocks, .. }) in
            [("", ["ln_final"].as_slice(), text), ("visual.", &["ln_pre", "ln_post"], vision)]
        {
            for norm in norms {
                add(format!("{tower}{norm}.weight"), &[*w]);
                add(format!("{tower}{norm}.bias"), &[*w]);
            }
            for i in 0..*blocks {
                let block = format!("{tower}transformer.resblocks.{i}");
                add(format!("{block}.attn.in_proj_weight"), &[3 * w, *w]);
                add(format!("{block}.attn.in_proj_bias"), &[3 * w]);
                let parts = [("attn.out_proj", [*w, *w]), ("mlp.c_fc", [4 * w, *w]), ("mlp.c_proj", [*w, 4 * w])];
                for (part, shape) in parts {
                    add(format!("{block}.{part}.weight"), &shape);
                    add(format!("{block}.{part}.bias"), &shape[..1]);
                }
                for (norm, part) in ["ln_1", "ln_2"].iter().flat_map(|n| [(n, "weight"), (n, "bias")]) {
                    add(format!("{block}.{norm}.{part}"), &[*w]);
                }
            }
        }
        add("token_embedding.weight".into(), &[VOCABULARY, text.width]);
        add("positional_embedding".into(), &[77, text.width]);
        add("visual.class_embedding".into(), &[vision.width]);
        add("visual.conv1.weight".into(), &[vision.width, 3, 14, 14]);
        add("visual.positional_embedding".into(), &[257, vision.width]);
        add("text_projection".into(), &[text.width, *features]);
        add("visual.proj".into(), &[vision.width, *features]);
        add("logit_scale".into(), &[]);
        let file = folder.join("open_clip_model.safetensors");
        write_weights(&file, shapes)?;
        Ok(file)
    }
}

/// LAION's aesthetic predictor on 768 features.
fn write_predictor(folder: &Path) -> Result<PathBuf> {
    let layers = [(0, [1024, 768]), (2, [128, 1024]), (4, [64, 128]), (6, [16, 64]), (7, [1, 16])];
    let parts = |(i, [to, from]): (usize, [usize; 2])| {
        [(format!("layers.{i}.weight"), vec![to, from]), (format!("layers.{i}.bias"), vec![to])]
    };
    let file = folder.join("predictor.safetensors");
    write_weights(&file, layers.into_iter().flat_map(parts).collect())?;
    Ok(file)
}

/// A tensor of bf16 that holds the same numbers again and again.
struct Drawn<'a> {
    /// Their bytes.
    numbers: &'a [u8],
    shape: Vec<usize>,
}

impl View for Drawn<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        while bytes.len() < self.data_len() {
            bytes.extend_from_slice(&self.numbers[..self.numbers.len().min(self.data_len() - bytes.len())]);
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

fn write_weights(path: &Path, shapes: Shapes) -> Result<()> {
    // A prime number of them, so that no two rows are alike. Norms have the weight 1.
    let normals = Stream::new(1, Purpose::Parameters, [0; 4]).normals(1_048_573);
    let bytes: Vec<u8> = normals.into_iter().flat_map(|normal| bf16::from_f32(0.02 * normal).to_le_bytes()).collect();
    let ones = bf16::ONE.to_le_bytes();
    let drawn = shapes.into_iter().enumerate().map(|(i, (name, shape))| {
        let is_norm = (name.contains("norm") || name.contains("ln_")) && name.ends_with("weight");
        (name, Drawn { numbers: if is_norm { &ones } else { &bytes[2 * i..] }, shape })
    });
    serialize_to_file(drawn, None, path).map_err(|error| Error::Failed(format!("{}: {error}", path.display())))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, value.to_string()).map_err(Error::io(path))
}
