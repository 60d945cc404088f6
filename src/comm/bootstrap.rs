//! Where ranks without MPI meet, by the launcher's variables: who is rank 0, on which port, and the word that tells
//! ranks of this job from strangers.

use super::job::Job;
use super::launcher::{Kind, Launcher, MPIRUN, Variables};
use crate::error::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv6Addr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Ports that are derived: below those that systems give to outgoing connections, above those of services.
const PORTS: std::ops::Range<u16> = 10_000..30_000;

/// What keys are derived for.
const CONTEXT: &str = "flowrl-dist 2026-11-22 ranks meet";

/// The meeting of a job's ranks.
#[derive(Clone)]
pub(super) struct Meeting {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub ranks: usize,
    /// Rank 0's host.
    pub host: String,
    /// The port that rank 0 listens on.
    pub port: u16,
    /// Known to the ranks of this job, in this life of it, and to nobody else; where no launcher numbers its jobs, to all
    /// ranks of this user.
    pub key: [u8; 32],
    /// Whether the launcher numbers its jobs: then whoever knows the key is of this job.
    pub is_numbered: bool,
    /// What this rank was started for.
    pub job: Job,
}

impl Meeting {
    /// Read from the variables of srun, mpirun or torchrun; MASTER_ADDR, MASTER_PORT and FLOWRL_TOKEN overrule what is
    /// derived from them.
    ///
    /// # Errors
    /// [`Error::Usage`] with the variable to set, where something is missing.
    pub fn of(launcher: &Launcher, variables: &Variables, job: Job) -> Result<Self> {
        let usage = |message: &str| Error::Usage(format!("ranks without MPI: {message}"));
        let rank = launcher.rank;
        let ranks = launcher.ranks.ok_or_else(|| usage("the launcher does not tell how many ranks there are"))?;
        let host = host(launcher, variables)
            .ok_or_else(|| usage("set MASTER_ADDR to the name of rank 0's host, on all ranks"))?;
        check_host(&host).map_err(|message| usage(&message))?;
        let life = life(variables);
        let port = match variables.get("MASTER_PORT") {
            None => derived_port(&life),
            Some(text) => text.trim().parse().ok().filter(|&port| port > 0).ok_or_else(|| {
                usage(&format!("MASTER_PORT is {text:?}; it must be a free port of {host}, 1 to 65535"))
            })?,
        };
        let token = match variables.get("FLOWRL_TOKEN").map(|token| token.trim()) {
            Some("") => return Err(usage("FLOWRL_TOKEN is empty")),
            Some(token) => token.to_owned(),
            None => own_token(variables)?,
        };
        let key = blake3::derive_key(CONTEXT, format!("{token}\n{life}").as_bytes());
        Ok(Self { rank, ranks, host, port, key, is_numbered: is_numbered(launcher, variables), job })
    }
}

/// Rank 0's host: as told, the first of Slurm's list, or this one where all ranks are on it.
fn host(launcher: &Launcher, variables: &Variables) -> Option<String> {
    if let Some(told) = variables.get("MASTER_ADDR") {
        return Some(told.trim().to_owned()).filter(|host| !host.is_empty());
    }
    if launcher.local_ranks.is_some() && launcher.local_ranks == launcher.ranks {
        return Some("127.0.0.1".into());
    }
    if launcher.name == MPIRUN {
        return None; // where it places rank 0 is not told
    }
    let lists = ["SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"];
    lists.iter().find_map(|name| first_node(variables.get(*name)?))
}

/// Refuses what is neither a host's name nor an address: nobody could come to it, and all would wait until the deadline.
///
/// # Errors
/// One line: the variable, its value, the remedy.
fn check_host(host: &str) -> std::result::Result<(), String> {
    let of_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let address = host.split_once('%').map_or(host, |(address, _zone)| address);
    match host.chars().all(of_name) || address.parse::<Ipv6Addr>().is_ok() {
        true => Ok(()),
        false => Err(format!(
            "MASTER_ADDR is {host:?}; it must be the name or the address of rank 0's host alone, such as node1 or 10.0.0.1, and \
             MASTER_PORT the port"
        )),
    }
}

/// "n7-4" of "n7-[4-6,9],m[1-2]".
fn first_node(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (prefix, rest) = list.trim().split_at(end.min(list.trim().len()));
    let number = match rest.strip_prefix('[') {
        None => "",
        Some(ranges) => ranges.split([',', '-', ']']).next()?,
    };
    let suffix = rest.split_once(']').map_or("", |(_, after)| after.split([',', '[']).next().unwrap_or(""));
    Some(format!("{prefix}{number}{suffix}")).filter(|name| !name.is_empty())
}

/// This start of this job: ranks of an earlier one that are still there must not join.
fn life(variables: &Variables) -> String {
    const PARTS: [&str; 6] = [
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT",
        "PMIX_NAMESPACE",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
    ];
    let part = |name: &&str| variables.get(*name).cloned().unwrap_or_default();
    PARTS.iter().map(part).collect::<Vec<_>>().join("/")
}

/// Whether the launcher gives every start of ranks another number. torchrun calls it "none" where it is given none.
fn is_numbered(launcher: &Launcher, variables: &Variables) -> bool {
    let number = match launcher.kind {
        Kind::Mpi => "PMIX_NAMESPACE",
        Kind::Srun => "SLURM_STEP_ID",
        Kind::Variables => "TORCHELASTIC_RUN_ID",
        Kind::Batch => return false,
    };
    variables.get(number).is_some_and(|number| !number.is_empty() && number != "none")
}

/// The same on all ranks, and different for jobs side by side.
fn derived_port(life: &str) -> u16 {
    let bytes = *blake3::hash(life.as_bytes()).as_bytes();
    PORTS.start + u16::from_le_bytes([bytes[0], bytes[1]]) % (PORTS.end - PORTS.start)
}

/// The user's own word, made at first use, for launches that give none: in a file that all hosts of a cluster share.
fn own_token(variables: &Variables) -> Result<String> {
    let folder = match (variables.get("XDG_CONFIG_HOME"), variables.get("HOME")) {
        (Some(config), _) => PathBuf::from(config),
        (None, Some(home)) => Path::new(home).join(".config"),
        (None, None) => {
            return Err(Error::Usage(
                "ranks without MPI: set FLOWRL_TOKEN to a secret word, the same on all ranks".into(),
            ));
        }
    };
    let folder = folder.join("flowrl-dist");
    fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    let path = folder.join("token");
    if !path.exists() {
        make_token(&folder, &path)?;
    }
    let metadata = fs::metadata(&path).map_err(Error::io(&path))?;
    if metadata.mode() & 0o077 != 0 {
        return Err(Error::Usage(format!(
            "{}: others may read this secret: chmod 600 it, or delete it",
            path.display()
        )));
    }
    crate::fs::read_to_string(&path)
}

/// Several ranks may do so at once: the first one's stays.
fn make_token(folder: &Path, path: &Path) -> Result<()> {
    let token = random().map_err(Error::io("/dev/urandom"))?.map(|byte| format!("{byte:02x}")).concat();
    let unfinished = folder.join(format!(".token-{}", &token[..16]));
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished).map_err(Error::io(path))?;
    file.write_all(token.as_bytes()).and_then(|()| file.sync_all()).map_err(Error::io(path))?;
    let linked = fs::hard_link(&unfinished, path);
    fs::remove_file(&unfinished).map_err(Error::io(path))?;
    match linked {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

/// Bytes that nobody can guess.
pub(super) fn random() -> std::io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::launcher::{detect, tests::variables};

    /// The meeting of a rank with these variables.
    fn meeting(text: &str) -> Result<Meeting> {
        let variables = variables(text);
        Meeting::of(&detect(&variables)?.unwrap(), &variables, Job::new(None))
    }

    const STEP: &str =
        "SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_STEP_ID=1 SLURM_JOB_ID=77 SLURM_STEP_NODELIST=n[2-3] FLOWRL_TOKEN=w";

    #[test]
    fn the_meeting_is_derived_from_slurm() {
        let step = meeting(STEP).unwrap();
        assert_eq!((step.rank, step.ranks, step.host.as_str()), (3, 4, "n2"));
        assert!(PORTS.contains(&step.port));
        let of = |more: &str| meeting(&format!("{STEP} {more}")).unwrap();
        assert_eq!(of("MASTER_ADDR=m9 MASTER_PORT=1234").port, 1234);
        assert_eq!(of("MASTER_ADDR=m9").host, "m9");
        // Another life, another job, another word.
        for other in ["SLURM_RESTART_COUNT=1", "SLURM_JOB_ID=78", "FLOWRL_TOKEN=v"] {
            assert_ne!(of(other).key, step.key, "{other}");
        }
        assert_eq!(of("SLURM_PROCID=0").key, step.key);
    }

    #[test]
    fn the_meeting_is_derived_from_mpirun_and_torchrun() {
        let mpirun = "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1 FLOWRL_TOKEN=w PMIX_NAMESPACE=5";
        let here = meeting(&format!("{mpirun} OMPI_COMM_WORLD_LOCAL_SIZE=2")).unwrap();
        assert_eq!((here.rank, here.ranks, here.host.as_str()), (1, 2, "127.0.0.1"));
        let refused = |text: &str, word: &str| {
            let message = meeting(text).err().unwrap().to_string();
            assert!(message.contains(word), "{message}");
        };
        refused(&format!("{mpirun} OMPI_COMM_WORLD_LOCAL_SIZE=1"), "set MASTER_ADDR");
        let torchrun = "RANK=1 WORLD_SIZE=2 MASTER_ADDR=m1 MASTER_PORT=29500 FLOWRL_TOKEN=w";
        let found = meeting(torchrun).unwrap();
        assert_eq!((found.rank, found.ranks, found.host.as_str(), found.port), (1, 2, "m1", 29500));
        let is_numbered = |text: &str| meeting(text).unwrap().is_numbered;
        assert!(is_numbered(&format!("{mpirun} OMPI_COMM_WORLD_LOCAL_SIZE=2")) && is_numbered(STEP));
        assert!(is_numbered(&format!("{torchrun} TORCHELASTIC_RUN_ID=7")));
        for name in ["", " TORCHELASTIC_RUN_ID=none", " SLURM_JOB_ID=7"] {
            assert!(!is_numbered(&format!("{torchrun}{name}")), "{name}");
        }
        refused(&format!("{torchrun} MASTER_PORT=x"), "MASTER_PORT is \"x\"");
        for wrong in ["http://127.0.0.1", "127.0.0.1:18503", "[::1]", "m1/", "node1,node2", "m\u{fc}"] {
            let told = format!("MASTER_ADDR is {wrong:?}; it must be the name or the address of rank 0's host alone");
            refused(&format!("{torchrun} MASTER_ADDR={wrong}"), &told);
        }
        for right in ["node-1.example.org", "gpu_7", "10.0.0.1", "::1", "fe80::1%eth0"] {
            assert_eq!(meeting(&format!("{torchrun} MASTER_ADDR={right}")).unwrap().host, right);
        }
        refused(&format!("{torchrun} FLOWRL_TOKEN="), "FLOWRL_TOKEN is empty");
    }

    #[test]
    fn the_first_of_a_list_of_nodes() {
        let table = [
            ("n1", "n1"),
            ("n1,n2", "n1"),
            ("n[3-5,9]", "n3"),
            ("gpu-[007,012]", "gpu-007"),
            ("rack1-n[1-2]-ib,x", "rack1-n1-ib"),
            ("a.example.org,b", "a.example.org"),
        ];
        for (list, first) in table {
            assert_eq!(first_node(list).as_deref(), Some(first), "{list}");
        }
        assert_eq!(first_node(""), None);
    }

    #[test]
    fn a_user_has_one_word_that_others_cannot_read() {
        let home = tempfile::tempdir().unwrap();
        let with_home = variables(&format!("HOME={}", home.path().display()));
        let words: Vec<String> = std::thread::scope(|scope| {
            let make = || scope.spawn(|| own_token(&with_home).unwrap());
            [make(), make(), make()].map(|thread| thread.join().unwrap()).into()
        });
        assert!(words.iter().all(|word| *word == words[0] && word.len() == 64), "{words:?}");
        let path = home.path().join(".config/flowrl-dist/token");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        assert!(own_token(&with_home).unwrap_err().to_string().contains("chmod 600"));
        assert!(own_token(&variables("")).unwrap_err().to_string().contains("set FLOWRL_TOKEN"));
    }
}
