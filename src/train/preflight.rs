//! What must hold on all ranks before the run begins: one program, one configuration, one run folder, messages that arrive
//! as they were sent; and what should. The plane of gradients is checked when it is there ([`World::on`]).

use crate::comm::{World, exchange, phase};
use crate::config::RunConfig;
use crate::digest;
use crate::error::{Error, Result};
use crate::optim::VECTORS;
use crate::plan::Plan;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Clocks of hosts that differ by more make times in logs hard to compare.
const SKEW_S: f64 = 5.0;

/// A file that rank 0 makes is seen by the others within this, on network file systems too.
const SEEN_WITHIN: Duration = Duration::from_secs(30);

/// What a rank says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct RankInfo {
    host: String,
    program: String,
    config: String,
    /// Seconds since 1970, taken by all ranks at the same moment.
    clock: f64,
}

/// Checks everything; collective, the same answer on every rank. Returns warnings.
///
/// # Errors
/// [`Error::Usage`] if a rank has another program or configuration than rank 0, or does not see its folders; the message
/// names the rank and its host. [`Error::Failed`] if a collective gives a wrong answer.
pub(super) fn preflight(config: &RunConfig, world: &World) -> Result<Vec<String>> {
    phase("preflight");
    let mut warnings = Vec::new();
    if world.world_size() > 1 {
        let program = program_digest()?;
        let config = digest::of(config.to_toml()?.as_bytes());
        world.host.barrier()?;
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let info = RankInfo { host: world.hostname().into(), program, config, clock };
        warnings.extend(compare(&exchange(&*world.host, &info)?)?);
        world.check_host_plane()?;
    }
    if world.place().hosts > 1 {
        shared(config).into_iter().try_for_each(|folder| folder.is_seen(SEEN_WITHIN, world))?;
    }
    warnings.extend(disk(config, world)?);
    Ok(warnings)
}

/// The digest of the running program's file, even if another file has taken its name since the start.
fn program_digest() -> Result<String> {
    const PATH: &str = "/proc/self/exe";
    let mut hasher = blake3::Hasher::new();
    let file = fs::File::open(PATH).map_err(Error::io(PATH))?;
    hasher.update_reader(file).map_err(Error::io(PATH))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Compares every rank's info with rank 0's; returns warnings.
fn compare(ranks: &[RankInfo]) -> Result<Vec<String>> {
    let first = &ranks[0];
    let mut warnings = Vec::new();
    for (rank, info) in ranks.iter().enumerate() {
        let who = format!("rank {rank} on {}", info.host);
        if info.program != first.program {
            return Err(Error::Usage(format!(
                "{who} runs another program than rank 0 on {} (digest {}, not {}): install the same build on all hosts",
                first.host,
                digest::short(&info.program),
                digest::short(&first.program)
            )));
        }
        if info.config != first.config {
            return Err(Error::Usage(format!(
                "{who} has another configuration than rank 0 on {} (digest {}, not {}): start all ranks with the same \
                 files and --set",
                first.host,
                digest::short(&info.config),
                digest::short(&first.config)
            )));
        }
        let skew = info.clock - first.clock;
        if skew.abs() > SKEW_S {
            warnings.push(format!("the clock of {who} is {skew:+.0} s from rank 0's: times in logs do not compare"));
        }
    }
    Ok(warnings)
}

/// A folder that all ranks must see.
struct Shared<'a> {
    path: &'a Path,
    what: &'static str,
    remedy: &'static str,
}

/// The run's folder, and where prompts are encoded the folder of them: each rank encodes its share for all.
fn shared(config: &RunConfig) -> Vec<Shared<'_>> {
    let run = Shared { path: &config.run.out, what: "run folder", remedy: "pass --out with a folder" };
    let prompts = config.model.kind.prompt_cache(&config.model).map(|path| Shared {
        path,
        what: "model.prompt_cache",
        remedy: "set model.prompt_cache to a folder",
    });
    [run].into_iter().chain(prompts).collect()
}

impl Shared<'_> {
    /// Whether a file that rank 0 makes in the folder is there for all `within` a time.
    fn is_seen(&self, within: Duration, world: &World) -> Result<()> {
        let Self { path, what, remedy } = self;
        let probe = path.join(".preflight");
        let word = exchange(&*world.host, &std::process::id())?[0].to_string();
        if world.rank() == 0 {
            fs::create_dir_all(path).map_err(Error::io(path))?;
            fs::write(&probe, &word).map_err(Error::io(&probe))?;
        }
        world.host.barrier()?;
        let end = Instant::now() + within;
        let sees = || fs::read_to_string(&probe).is_ok_and(|found| found == word);
        while !sees() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(100));
        }
        let all = exchange(&*world.host, &(sees(), world.hostname().to_string()))?;
        if world.rank() == 0 {
            fs::remove_file(&probe).map_err(Error::io(&probe))?;
        }
        match all.iter().position(|(sees, _)| !sees) {
            None => Ok(()),
            Some(rank) => Err(Error::Usage(format!(
                "{what} {}: rank {rank} on {} does not see what rank 0 on {} writes there; {remedy} on a file system that all \
                 hosts share",
                path.display(),
                all[rank].1,
                all[0].1
            ))),
        }
    }
}

/// A warning if there is too little room for the checkpoints that are kept and one that is being written.
fn disk(config: &RunConfig, world: &World) -> Result<Option<String>> {
    let plan = Plan::of(config, world.world_size())?;
    let kept = config.run.keep_last as u64 + 1 + u64::from(config.run.keep_best);
    let needed = kept * (plan.trainable * VECTORS.len() * size_of::<f32>()) as u64;
    let mut folders =
        config.run.out.ancestors().map(|folder| if folder.as_os_str().is_empty() { Path::new(".") } else { folder });
    let free = folders.find_map(|folder| rustix::fs::statvfs(folder).ok()).map(|found| found.f_bavail * found.f_frsize);
    Ok(free.filter(|&free| free < needed).map(|free| low(&config.run.out, free, needed)))
}

fn low(out: &Path, free: u64, needed: u64) -> String {
    let gb = |bytes: u64| bytes as f64 / 1e9;
    format!(
        "{}: {:.1} GB are free, and the checkpoints that are kept need about {:.1} GB: make room, or lower run.keep_last",
        out.display(),
        gb(free),
        gb(needed)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::ThreadGroup;
    use crate::pipeline::Kind;

    fn info() -> RankInfo {
        RankInfo { host: "n1".into(), program: "p".repeat(64), config: "c".repeat(64), clock: 1e9 }
    }

    fn folder_of_run(path: &Path) -> Shared<'_> {
        Shared { path, what: "run folder", remedy: "pass --out with a folder" }
    }

    #[test]
    fn what_differs_names_the_rank_and_its_host() {
        assert!(compare(&[info(), info()]).unwrap().is_empty());
        let other = |change: fn(&mut RankInfo)| {
            let mut other = RankInfo { host: "n2".into(), ..info() };
            change(&mut other);
            compare(&[info(), info(), other])
        };
        let message = other(|info| info.program = "q".repeat(64)).unwrap_err().to_string();
        assert!(
            message.starts_with("rank 2 on n2 runs another program than rank 0 on n1 (digest qqqqqqqqqqqq"),
            "{message}"
        );
        let message = other(|info| info.config = "d".repeat(64)).unwrap_err().to_string();
        assert!(message.starts_with("rank 2 on n2 has another configuration than rank 0 on n1"), "{message}");
        let warnings = other(|info| info.clock -= 60.0).unwrap();
        assert_eq!(warnings, ["the clock of rank 2 on n2 is -60 s from rank 0's: times in logs do not compare"]);
    }

    #[test]
    fn ranks_that_agree_pass_and_a_rank_with_other_settings_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let load = |seed: usize| {
            let set = [format!("run.seed={seed}"), format!("run.out={:?}", folder.path())];
            RunConfig::load(None, &set)
        };
        ThreadGroup::run(3, |world| {
            preflight(&load(1)?, &world)?;
            folder_of_run(&folder.path().join("new")).is_seen(SEEN_WITHIN, &world)
        })
        .unwrap();
        let error = ThreadGroup::run(2, |world| preflight(&load(world.rank())?, &world)).unwrap_err();
        assert!(
            error.to_string().contains("rank 1 on ") && error.to_string().contains("another configuration"),
            "{error}"
        );
    }

    #[test]
    fn a_run_folder_of_its_own_is_told() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let looks = |world: World| {
            let mut config = RunConfig::load(None, &[])?;
            config.model.kind = Kind::named("sd35-medium").unwrap();
            config.run.out = folders[0].path().into();
            config.model.prompt_cache = folders[world.rank()].path().into();
            shared(&config).into_iter().try_for_each(|folder| folder.is_seen(Duration::from_secs(1), &world))
        };
        let error = ThreadGroup::run(2, looks).unwrap_err().to_string();
        assert!(
            error.starts_with("model.prompt_cache ") && error.contains("set model.prompt_cache to a folder"),
            "{error}"
        );
        let looks = |world: World| folder_of_run(folders[world.rank()].path()).is_seen(Duration::from_secs(1), &world);
        let error = ThreadGroup::run(2, looks).unwrap_err();
        assert!(error.to_string().contains("rank 1 on ") && error.to_string().contains("all hosts share"), "{error}");
    }

    #[test]
    fn little_room_is_told() {
        let message = low(Path::new("runs/a"), 1_500_000_000, 4_000_000_000);
        assert!(
            message.starts_with("runs/a: 1.5 GB are free, and the checkpoints that are kept need about 4.0 GB"),
            "{message}"
        );
        let config = RunConfig::load(None, &[]).unwrap();
        assert_eq!(disk(&config, &World::solo()).unwrap(), None, "this machine has room for the embedded task");
    }
}
