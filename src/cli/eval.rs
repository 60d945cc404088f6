//! `flowrl-dist eval`.

use super::checkpoint::{Opened, Source, Which};
use super::{launch, on_ranks, print};
use crate::comm::agreed;
use crate::config::Use;
use crate::data::{Format, PromptSet, Split};
use crate::error::{EXIT_DONE, Error, Result};
use crate::evaluate::{Evaluation, evaluated};
use crate::observe::logging;
use crate::plan;
use crate::reward::{Loader, Rewards};
use serde_json::{Map, Value};

/// What is evaluated.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    flowrl-dist eval --checkpoint runs/a\n  \
    mpirun -n 2 flowrl-dist eval --checkpoint runs/a/checkpoints/update_00000100 --data prompts.txt --json")]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// Overrides one key of the configuration; may be repeated: --set model.path=MOVED
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The prompts: a file with one a line, or the name of an embedded set [default: those of the run's evaluations]
    #[arg(long, value_name = "FILE")]
    data: Option<String>,
    /// How the file is written, as data.format [default: by what it holds]
    #[arg(long, value_name = "FORMAT", requires = "data")]
    format: Option<Format>,
    /// Which of the checkpoint's three sets of parameters
    #[arg(long, default_value = "ema")]
    which: Which,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Evaluates as a run does, `[eval]` and all, and prints the scores.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let purpose = if arguments.data.is_some() { Use::Model } else { Use::Evaluation };
    let opened = arguments.source.open(&arguments.set, purpose);
    let launch = launch(opened.as_ref().ok().map(|opened| &opened.config));
    let prepared = opened.and_then(|opened| prepare(arguments, opened));
    on_ranks(&launch, prepared, |Prepared { opened, name, prompts }, world| {
        let config = &opened.config;
        logging::init(world.rank(), None, "info")?;
        let notes = [plan::prompts::evaluated(config, name, prompts), config.shift_note().into_iter().collect()];
        notes.concat().iter().filter(|_| world.rank() == 0).for_each(|note| tracing::warn!("{note}"));
        // First the rewards: what is wrong with them is told before anything takes time.
        let device = opened.device(world)?;
        let loader = Loader::new(candle_core::utils::get_num_threads(), &device);
        let rewards: Rewards = loader.build(&evaluated(config))?.into();
        agreed(rewards.iter().try_for_each(|reward| reward.ready()), &*world.host)?;
        let sampler = config.eval.sampler(&config.sampler);
        let texts: Vec<&str> = prompts.prompts.iter().flat_map(|prompt| prompt.texts(sampler.is_guided())).collect();
        let (pipeline, params) = opened.load(arguments.which, &texts, &device, world)?;
        let evaluation = Evaluation {
            prompts: &prompts.prompts,
            images_per_prompt: config.eval.images_per_prompt,
            sampler: &sampler,
            micro_batch: config.batch.micro_batch,
            seed: config.eval.seed,
            overlap: config.parallel.reward_overlap,
        };
        let (metrics, _) = evaluation.run(&pipeline, &params, &rewards, world)?;
        if world.rank() == 0 {
            let text = match arguments.json {
                true => {
                    let object: Map<String, Value> = metrics.iter().map(|(name, x)| (name.into(), x.into())).collect();
                    serde_json::to_string_pretty(&object).map_err(|e| Error::Failed(format!("no JSON: {e}")))?
                }
                false => metrics.iter().map(|(name, x)| format!("{name:<28} {x:.4}\n")).collect(),
            };
            print(&text);
        }
        Ok(EXIT_DONE)
    })
}

/// What is known before the ranks meet.
struct Prepared {
    opened: Opened,
    /// What the prompts are called in messages.
    name: String,
    prompts: PromptSet,
}

/// Reads the prompts, and checks what can be before the ranks meet.
fn prepare(arguments: &Arguments, opened: Opened) -> Result<Prepared> {
    let config = &opened.config;
    let (name, mut prompts) = match &arguments.data {
        Some(source) => {
            let format = arguments.format.unwrap_or_default();
            (format!("--data {source}"), PromptSet::load(source, Split::Eval, format)?)
        }
        None => (format!("data.eval = {:?}", config.data.eval), config.eval_prompts()?),
    };
    prompts.prompts.truncate(config.eval.count(prompts.len()));
    config.check_files()?;
    Ok(Prepared { opened, name, prompts })
}
