//! `flowrl-dist sample`.

use super::checkpoint::{Source, Which};
use super::{check_out, choose_threads, print};
use crate::comm::World;
use crate::config::Use;
use crate::data::{Prompt, PromptSet};
use crate::error::{EXIT_DONE, Error, Result};
use crate::fs;
use crate::observe::{grid, logging};
use crate::rng::Purpose;
use crate::rollout::{Request, Sampling};
use std::path::PathBuf;

/// What is sampled, and where to.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    flowrl-dist sample --checkpoint runs/a --prompt '\"417\" in red on yellow' -n 8 --out grid.png\n  \
    flowrl-dist sample --config configs/glyphs/flow-awr.toml --prompt '\"417\" in red on yellow' --out base.png")]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// Overrides one key of the configuration; may be repeated: --set model.path=MOVED
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// What the pictures show; as often as wanted
    #[arg(long, required = true)]
    prompt: Vec<String>,
    /// What guidance leads away from (eval.guidance) [default: the empty prompt]
    #[arg(long, value_name = "PROMPT")]
    negative_prompt: Option<String>,
    /// Pictures of each prompt
    #[arg(short = 'n', long = "images", value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    images: u16,
    /// Seed of the noise [default: eval.seed, that of the run's evaluations]
    #[arg(long)]
    seed: Option<u64>,
    /// Which of the checkpoint's three sets of parameters
    #[arg(long, default_value = "ema")]
    which: Which,
    /// The picture that is written, a grid (PNG)
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Pictures in a row of the grid.
const COLUMNS: usize = 8;

/// Small pictures are enlarged to this many pixels.
const LEAST: usize = 96;

/// Samples with the solver of evaluations and says where the picture is.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let out = &arguments.out;
    if let Some(end) = out.extension().filter(|end| !end.eq_ignore_ascii_case("png")) {
        let (end, png) = (end.to_string_lossy(), out.with_extension("png"));
        return Err(Error::Usage(format!(
            "--out {}: pictures are written as PNG, not as {end}; name it {}",
            out.display(),
            png.display()
        )));
    }
    check_out("--out", out)?;
    let opened = arguments.source.open(&arguments.set, Use::Model)?;
    opened.config.model.check_files()?;
    choose_threads()?;
    logging::init(0, None, "info")?;
    let config = &opened.config;
    let sampler = config.eval.sampler(&config.sampler);
    config.shift_note().into_iter().for_each(|note| tracing::warn!("{note}"));
    let mut set: PromptSet = arguments.prompt.iter().cloned().collect();
    if let Some(negative) = &arguments.negative_prompt {
        if !sampler.is_guided() {
            return Err(Error::Usage(format!(
                "--negative-prompt {negative:?}: has no effect without guidance; set eval.guidance above 1 in a file for \
                 --config"
            )));
        }
        set.prompts.iter_mut().for_each(|prompt| prompt.negative = Some(negative.as_str().into()));
    }
    let texts: Vec<&str> = set.prompts.iter().flat_map(|prompt| prompt.texts(sampler.is_guided())).collect();
    let world = World::solo();
    let (pipeline, params) = opened.load(arguments.which, &texts, &opened.device(&world)?, &world)?;
    let images = usize::from(arguments.images);
    let of_prompt =
        |prompt: &Prompt| (0..images).map(|image| Request { prompt: prompt.clone(), image }).collect::<Vec<_>>();
    let requests: Vec<Request> = set.prompts.iter().flat_map(of_prompt).collect();
    let prompts: Vec<Prompt> = requests.iter().map(|request| request.prompt.clone()).collect();
    let sampling = Sampling {
        pipeline: &pipeline,
        params: &params,
        sampler: &sampler,
        micro_batch: config.batch.micro_batch,
        seed: arguments.seed.unwrap_or(config.eval.seed),
        purpose: Purpose::Evaluation,
        iteration: 0,
    };
    let samples = sampling.run(&requests, requests.len())?;
    if let Some(i) = samples.first_not_finite()? {
        return Err(Error::NotFinite(format!(
            "image {} of the prompt {:?} is not finite: the weights are damaged, or they overflow; take others",
            requests[i].image, requests[i].prompt.text
        )));
    }
    let captions: Vec<String> = prompts.into_iter().map(|prompt| prompt.text.to_string()).collect();
    let scale = LEAST.div_ceil(pipeline.picture().1.max(1));
    let picture = grid::image_grid(&pipeline.decode(&samples.x0)?, &captions, COLUMNS.min(images), scale as u32)?;
    fs::write_out(&arguments.out, grid::png(&picture)?)?;
    print(&arguments.out.display().to_string());
    Ok(EXIT_DONE)
}
