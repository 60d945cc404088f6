//! `flowrl-dist plan`.

use super::print;
use crate::config::RunConfig;
use crate::error::{EXIT_DONE, Error, Result};
use crate::forecast::{Forecast, Links, Machine, Work};
use crate::plan::Plan;
use serde::Serialize;
use std::path::PathBuf;

/// What a plan is asked for.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  flowrl-dist plan --config configs/glyphs/flow-awr.toml --ranks 8\n  \
    flowrl-dist plan --config configs/sd35/pickscore-flow-awr.toml --ranks 64 --machine configs/machines/h100x8.toml")]
pub struct Arguments {
    /// Configuration file (TOML); without it the embedded glyphs task
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Overrides one key; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Ranks of the run
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    /// Ranks of a node, to tell its links apart; without it as many as the machine has devices
    #[arg(long, value_name = "RANKS")]
    ranks_per_node: Option<usize>,
    /// Machine file (TOML), such as configs/machines/h100x8.toml: predicts the times, too, and refuses what does not
    /// fit into the devices' memory
    #[arg(long, value_name = "FILE")]
    machine: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Serialize)]
struct Answer {
    #[serde(flatten)]
    plan: Plan,
    work: Work,
    #[serde(skip_serializing_if = "Option::is_none")]
    links: Option<Links>,
    #[serde(skip_serializing_if = "Option::is_none")]
    forecast: Option<Forecast>,
}

/// Prints the geometry of a run, or what makes it impossible.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let config = RunConfig::load(arguments.config.as_deref(), &arguments.set)?;
    if let Some(file) = arguments.machine.as_ref().filter(|file| !file.is_file()) {
        let message = "there is no such file; give a machine file, such as configs/machines/h100x8.toml";
        return Err(Error::Usage(format!("--machine {}: {message}", file.display())));
    }
    let machine = arguments.machine.as_deref().map(Machine::read).transpose()?;
    let plan = Plan::of(&config, arguments.ranks)?;
    let per_node = match arguments.ranks_per_node {
        Some(0) => return Err(Error::Usage("--ranks-per-node 0: use at least 1".into())),
        given => given.or(machine.as_ref().map(|machine| machine.devices)),
    };
    let work = Work::new(&config, &plan)?;
    let links = per_node.map(|per_node| Links::new(work.sent, plan.ranks, per_node));
    let forecast = machine.zip(per_node).map(|(machine, per_node)| Forecast::new(&config, &plan, &machine, per_node));
    let answer = Answer { plan, work, links, forecast: forecast.transpose()? };
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&answer).map_err(|e| Error::Failed(format!("no JSON: {e}")))?,
        false => {
            let links = answer.links.map_or(String::new(), |links| links.to_string());
            let forecast = answer.forecast.map_or(String::new(), |forecast| forecast.to_string());
            format!("{}{}{links}{forecast}", answer.plan, answer.work)
        }
    };
    print(&text);
    Ok(EXIT_DONE)
}
