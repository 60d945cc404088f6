//! `flowrl-dist serve-reward`.

use super::choose_threads;
use crate::config;
use crate::device::{self, DeviceChoice};
use crate::error::{EXIT_DONE, Error, Result};
use crate::observe::logging::{self, say};
use crate::reward::{Loader, RewardConfig, RewardKind, Token, serve};
use serde::Deserialize;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::path::PathBuf;
use tokio::sync::oneshot;

/// What is served, and where.
#[derive(clap::Args)]
pub struct Arguments {
    /// Rewards that need no files, by name: ocr, jpeg-compressibility, ...
    #[arg(long, value_name = "NAME", num_args = 1..)]
    reward: Vec<String>,
    /// A TOML file whose [[reward]] sections are served, too; other sections are not read
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen at
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8000")]
    listen: String,
    /// Where models of the CLIP family compute: auto takes the GPU where there is one that works
    #[arg(long, value_enum, value_name = "auto|cpu|cuda", hide_possible_values = true, default_value = "auto")]
    device: DeviceChoice,
    /// File with a token that every request must have, which only its owner may read; needed where other machines may ask
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// The part of a configuration that is served.
#[derive(Deserialize)]
struct Served {
    #[serde(default)]
    reward: Vec<RewardConfig>,
}

/// Serves until SIGTERM or SIGINT; what was asked before is answered, unless a second signal comes.
pub fn run(arguments: &Arguments) -> Result<i32> {
    choose_threads()?;
    logging::init(0, None, "info")?;
    let token = arguments.token_file.as_deref().map(Token::read).transpose()?;
    let (listener, address) = serve::listen(&arguments.listen, token.is_some())?;
    let configs = configs(arguments)?;
    let without = ["--device cuda", "give --device cpu"];
    let (device, why) = device::select_as(arguments.device, (0, 1), without)?;
    let rewards = Loader::new(candle_core::utils::get_num_threads(), &device).build(&configs)?;

    let (stop, stopped) = oneshot::channel();
    let mut signals =
        Signals::new([SIGTERM, SIGINT]).map_err(|e| Error::Failed(format!("signals cannot be caught: {e}")))?;
    let handle = signals.handle();
    let waiter = std::thread::spawn(move || {
        let mut signals = signals.forever();
        if let Some(signal) = signals.next() {
            say(&format!("signal {signal}: answering what was asked, then stopping; again to stop at once"));
        }
        stop.send(()).ok();
        if let Some(signal) = signals.next() {
            std::process::exit(128 + signal);
        }
    });
    let names: Vec<&str> = rewards.iter().map(|reward| reward.name()).collect();
    say(&format!("models compute on {why}"));
    say(&format!("serving {} at http://{address}", names.join(", ")));
    let result = serve::serve(rewards.into(), listener, token, stopped);
    handle.close();
    waiter.join().ok();
    result.map(|()| EXIT_DONE)
}

/// The rewards of the command line and of the file.
fn configs(arguments: &Arguments) -> Result<Vec<RewardConfig>> {
    let mut configs = arguments.reward.iter().map(|name| named(name)).collect::<Result<Vec<_>>>()?;
    if let Some(file) = &arguments.config {
        configs.extend(config::read::<Served>(file, &[], |_| Ok(()))?.reward);
    }
    if configs.is_empty() {
        let message = "there is nothing to serve; name rewards with --reward, or give --config a file with [[reward]]";
        return Err(Error::Usage(message.into()));
    }
    match configs.iter().find(|config| config.kind() == RewardKind::Remote) {
        None => Ok(configs),
        Some(remote) => Err(Error::Usage(format!("reward {}: is another server's; ask that one", remote.label()))),
    }
}

/// A reward of the command line, which can say no more of it than its name.
fn named(name: &str) -> Result<RewardConfig> {
    let by_name = |kind: &RewardKind| RewardConfig::new(*kind).check(u64::MAX).is_ok();
    match RewardKind::ALL.iter().copied().find(|kind| kind.name() == name) {
        Some(kind) if by_name(&kind) => Ok(RewardConfig::new(kind)),
        Some(_) => Err(Error::Usage(format!(
            "--reward {name}: needs more than its name; write it as [[reward]], with its path and what else it needs, into a \
             TOML file, and give that with --config"
        ))),
        None => {
            let names: Vec<&str> =
                RewardKind::ALL.iter().filter(|kind| by_name(kind)).map(|kind| kind.name()).collect();
            Err(Error::Usage(format!(
                "--reward {name}: there is no such reward; choose from {}, or give --config for those that need files",
                names.join(", ")
            )))
        }
    }
}
