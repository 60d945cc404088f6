//! The command line: one file a command.

use crate::comm::{Backend, World};
use crate::error::{EXIT_DONE, Result};
use std::time::Duration;

/// tmp
pub fn run() -> i32 {
    match go() { Ok(()) => EXIT_DONE, Err(e) => { eprintln!("{e}"); e.exit_code() } }
}
fn go() -> Result<()> {
    let world = World::from_environment(Backend::Auto, Duration::from_secs(600))?;
    let terminal = crate::observe::logging::init(world.rank(), None, "info")?;
    let path = std::env::args().nth(1).unwrap_or_default();
    let config: crate::pretrain::PretrainConfig = toml::from_str(&std::fs::read_to_string(path).unwrap_or_default()).map_err(|e| crate::Error::Usage(e.to_string()))?;
    let rewards: Vec<Box<dyn crate::reward::Reward>> = vec![Box::new(crate::reward::Ocr::new(1)?), Box::new(crate::reward::ColourMatch)];
    let mut progress = crate::observe::Progress::new(config.steps, world.rank() == 0, &terminal);
    let d = crate::pretrain::pretrain(&config, &world, &rewards, &mut progress)?;
    eprintln!("{d}");
    Ok(())
}
