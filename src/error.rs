//! The one error type. Every message says what is wrong, with the value, and what to do about it, in one line.

use std::path::{Path, PathBuf};

/// What can go wrong, by who can mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line or the configuration is wrong: the user mends it, nothing was started.
    #[error("{0}")]
    Usage(String),
    /// A checkpoint is absent, damaged, incomplete or of another model.
    #[error("checkpoint {}: {message}", path.display())]
    Checkpoint {
        /// The checkpoint's folder or the file in it.
        path: PathBuf,
        /// What is wrong with it and what to do.
        message: String,
    },
    /// A file of the user's (weights, prompts, assets) cannot be used.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        message: String,
    },
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A checkpoint could not be written; the run is as it was, and so are the earlier checkpoints.
    #[error("checkpoint {}: not saved: {message}", path.display())]
    NotSaved {
        /// The checkpoint's folder.
        path: PathBuf,
        /// Which rank, and why.
        message: String,
    },
    /// A reward could not be computed.
    #[error("reward {name}: {message}")]
    Reward {
        /// The reward's name in the configuration.
        name: String,
        /// What happened.
        message: String,
    },
    /// A number that must be finite is not; the weights were left alone.
    #[error("{0}")]
    NotFinite(String),
    /// A peer is gone or does not answer; the newest complete checkpoint is good.
    #[error("{0}")]
    Peer(String),
    /// The tensor library failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// Anything else that failed.
    #[error("{0}")]
    Failed(String),
}

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Exit code: all done.
pub const EXIT_DONE: i32 = 0;
/// Exit code: failed.
pub const EXIT_FAILED: i32 = 1;
/// Exit code: the command line, the configuration or a file named by it is wrong.
pub const EXIT_USAGE: i32 = 2;
/// The exit code that ends a job in which something failed: `code`, unless it would pass for success, as 0 does, and 256 of
/// which a process can only say the last eight bits.
pub fn failing(code: i32) -> i32 {
    if (1..=255).contains(&code) { code } else { EXIT_FAILED }
}

/// Exit code: a checkpoint is there and the job wants to be started again (preempted, peer lost).
pub const EXIT_RESTART: i32 = 75;

impl Error {
    /// The program's exit code for this error.
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Usage(_) | Error::Checkpoint { .. } | Error::File { .. } => EXIT_USAGE,
            Error::Peer(_) => EXIT_RESTART,
            Error::Io { .. }
            | Error::NotSaved { .. }
            | Error::Reward { .. }
            | Error::NotFinite(_)
            | Error::Tensor(_)
            | Error::Failed(_) => EXIT_FAILED,
        }
    }

    /// An i/o error with the path it happened on: `.map_err(Error::io(path))`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }
}
