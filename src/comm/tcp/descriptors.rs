//! The open files that connections need: as many as there may be, and the word for it where there are too few.

use crate::error::{Error, Result};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Of each connection of a peer, and a second one of its control connection, on which a thread listens.
const PER_PEER: usize = super::CONNECTIONS + 1;

/// For what a run opens besides: files, devices, strangers at the door.
const RESERVE: usize = 64;

/// Raises this process's limit of open files as far as its user may, and checks that as many peers fit.
///
/// # Errors
/// [`Error::Usage`] with what is needed, the limit and who sets it.
pub(super) fn provide(peers: usize) -> Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // Refused, the limit is as it was; that is what counts below.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
    let limit = getrlimit(Resource::Nofile).current;
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    check(peers, open, limit)
}

/// No limit is none.
fn check(peers: usize, open: usize, limit: Option<u64>) -> Result<()> {
    let need = peers * PER_PEER + open + RESERVE;
    match limit {
        Some(limit) if limit < need as u64 => Err(Error::Usage(format!(
            "{peers} other ranks over TCP need {need} open files in rank 0's process, of which its limit allows {limit}: \
             raise it on that host (ulimit -Hn; LimitNOFILE= of slurmd), or join the ranks by MPI"
        ))),
        _ => Ok(()),
    }
}

/// Whether this process or its host has no more open files to give, which waiting does not mend.
pub(super) fn are_out(error: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// What to say then.
pub(super) fn out(error: &std::io::Error) -> Error {
    Error::Failed(format!(
        "no further connection between ranks can be opened: {error}; let this process have more open files (ulimit -n)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_is_compared_with_the_limit() {
        assert!(check(100, 10, Some(474)).is_ok());
        assert!(check(100, 10, None).is_ok());
        let refused = check(100, 10, Some(473)).unwrap_err();
        assert_eq!(refused.exit_code(), crate::error::EXIT_USAGE);
        let words = "100 other ranks over TCP need 474 open files in rank 0's process, of which its limit allows 473";
        assert!(refused.to_string().starts_with(words), "{refused}");
        assert!(are_out(&std::io::Error::from_raw_os_error(24)) && are_out(&std::io::Error::from_raw_os_error(23)));
        assert!(!are_out(&std::io::Error::from_raw_os_error(111)) && !are_out(&std::io::Error::other("24")));
    }
}
