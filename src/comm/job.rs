//! What a rank was started for: ranks that share a port and a token may still be of two jobs.

use crate::digest;
use std::os::unix::ffi::OsStrExt;

/// The command and the configuration of a rank, as digests.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Job {
    command: String,
    /// None where it could not be read.
    settings: Option<String>,
}

impl Job {
    /// This process's command line, with the configuration that it comes to.
    pub fn new(settings: Option<&str>) -> Self {
        let arguments: Vec<_> = std::env::args_os().skip(1).collect();
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.as_bytes()).collect();
        let short = |bytes: &[u8]| digest::short(&digest::of(bytes)).to_owned();
        Self { command: short(&arguments.join(&0)), settings: settings.map(|text| short(text.as_bytes())) }
    }

    /// Whether a rank with the other's arguments may be of this job: the same command with files that differ is a mistake in
    /// one job, which the ranks tell once they have met.
    pub fn includes(&self, other: &Job) -> bool {
        self.command == other.command || (self.settings.is_some() && self.settings == other.settings)
    }
}

impl std::fmt::Display for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let settings = self.settings.as_deref().unwrap_or("unknown");
        write!(f, "command {}, configuration {settings}", self.command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_known_by_its_command_or_its_configuration() {
        let job = |command: &str, settings: Option<&str>| Job {
            command: command.into(),
            settings: settings.map(str::to_owned),
        };
        let ours = job("a", Some("x"));
        for (other, is_ours) in [
            (job("a", Some("x")), true),
            (job("a", Some("y")), true),
            (job("a", None), true),
            (job("b", Some("x")), true),
            (job("b", Some("y")), false),
            (job("b", None), false),
        ] {
            assert_eq!(ours.includes(&other), is_ours, "{other}");
            assert_eq!(other.includes(&ours), is_ours, "{other}");
        }
        assert!(!job("a", None).includes(&job("b", None)), "two configurations that nobody could read");
        assert_eq!(Job::new(Some("x")).settings, Job::new(Some("x")).settings);
        assert_ne!(Job::new(Some("x")).settings, Job::new(Some("y")).settings);
    }
}
