//! The keys of `[[reward]]` with `name = "remote"`.

use super::{OnFailure, Remote, WireFormat, longest_s};
use crate::checks::without_secrets;
use crate::data::Prompt;
use crate::reward::config::lacks;
use crate::reward::{Fit, Loader, Reward, RewardSpec, Token};
use serde::{Deserialize, Serialize};
use std::net::Ipv6Addr;
use ureq::http::Uri;

/// Where a server is, what it is asked for, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RemoteConfig {
    /// The server, such as `http://node7:8000`.
    pub url: String,
    /// Its name for the reward ("name/part" for a part of UniRL's); also that in the metrics.
    pub reward: String,
    /// "flowrl" (flowrl-dist serve-reward), "flow-factory" (/compute), "unirl" (/score).
    pub format: WireFormat,
    /// Seconds that a request may take.
    pub timeout_s: u64,
    /// Attempts after the first; pauses of 0.5 s to 8 s between them.
    pub retries: u32,
    /// Images of a request.
    pub batch: usize,
    /// Requests of a rank at a time.
    pub connections: usize,
    /// The environment variable with the server's token; left out: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_env: Option<String>,
    /// "stop": a checkpoint, then the end; "drop": groups without all scores are left out.
    pub on_failure: OnFailure,
}

impl Default for RemoteConfig {
    fn default() -> Self {
        Self {
            url: String::new(),
            reward: String::new(),
            format: WireFormat::Flowrl,
            timeout_s: 60,
            retries: 3,
            batch: 16,
            connections: 4,
            token_env: None,
            on_failure: OnFailure::Stop,
        }
    }
}

impl RewardSpec for RemoteConfig {
    fn check(&self, name: &str, deadline_s: u64) -> Result<(), String> {
        if self.url.is_empty() {
            return Err(lacks(name, "url", "the server's address such as \"http://node7:8000\""));
        }
        check_url(&self.url)?;
        if self.reward.is_empty() {
            return Err(lacks(name, "reward", "the server's name for the reward such as \"geneval\""));
        }
        if self.reward.trim().is_empty() {
            return Err("reward = \"\": must be the server's name for the reward, such as \"geneval\"".into());
        }
        for (key, value, most) in [("batch", self.batch, 4096), ("connections", self.connections, 64)] {
            if !(1..=most).contains(&value) {
                return Err(format!("{key} = {value}: must be from 1 to {most}"));
            }
        }
        let Self { timeout_s, retries, .. } = *self;
        if retries > 100 {
            return Err(format!("retries = {retries}: must be at most 100"));
        }
        if timeout_s == 0 {
            return Err("timeout_s = 0: must be at least 1".into());
        }
        let held = longest_s(timeout_s, retries);
        if held >= deadline_s {
            return Err(format!(
                "timeout_s = {timeout_s}: a silent server would hold a rank for {held} s with its retries, and \
                 parallel.deadline_s = {deadline_s} ends the job before; use a shorter time, fewer retries, or a longer \
                 deadline"
            ));
        }
        Ok(())
    }

    fn check_files(&self) -> Result<(), String> {
        self.token().map(drop)
    }

    fn fit(&self, _prompt: &Prompt) -> Fit {
        Fit::Unknown
    }

    fn label<'a>(&'a self, name: &'a str) -> &'a str {
        if self.reward.is_empty() { name } else { &self.reward }
    }

    fn not_deciding(&self) -> &'static [&'static str] {
        &["url", "timeout_s", "retries", "batch", "connections", "token_env"]
    }

    fn build(&self, _loader: &Loader) -> crate::Result<Box<dyn Reward>> {
        Ok(Box::new(Remote::new(self)?))
    }
}

impl RemoteConfig {
    /// The server's token, in the variable that `token_env` names; none if it names none.
    ///
    /// # Errors
    /// One line: there is no such variable, or it holds no token that a server takes.
    pub fn token(&self) -> Result<Option<Token>, String> {
        let Some(variable) = &self.token_env else { return Ok(None) };
        let of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if !variable.chars().all(of_name) || variable.is_empty() {
            // Not shown: it may be the token itself.
            return Err("token_env: must be the name of the environment variable that holds the token".into());
        }
        let missing = |_| {
            format!("token_env = {variable:?}: there is no such variable; export it, with the token, on every rank")
        };
        let token = std::env::var(variable).map_err(missing)?;
        Token::new(&token).map(Some).map_err(|message| format!("token_env = {variable:?}: the variable {message}"))
    }
}

/// Whether it is the address of a server, without a secret in it, which logs and config.toml would show.
fn check_url(url: &str) -> Result<(), String> {
    let shown = without_secrets(url);
    if url.contains('@') {
        return Err(format!(
            "url = {shown:?}: has a user or password in it, which logs and files would show; give the server a token, and \
             name the variable that holds it in token_env"
        ));
    }
    if url.contains(['?', '#']) {
        return Err(format!("url = {shown:?}: must end before ? and #: paths are added to it"));
    }
    match url.parse::<Uri>().is_ok_and(|uri| is_server(&uri)) {
        true => Ok(()),
        false => Err(format!("url = {url:?}: must be the server's address, such as \"http://node7:8000\"")),
    }
}

/// Whether an address names a host, and a port that there can be, or none.
fn is_server(uri: &Uri) -> bool {
    let (Some("http" | "https"), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return false };
    let is_port = |text: &str| text.parse::<u16>().is_ok_and(|port| port > 0);
    let after = authority.as_str().strip_prefix(authority.host());
    let is_address = |host: &str| match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').is_some_and(|address| address.parse::<Ipv6Addr>().is_ok()),
        None => !host.is_empty(),
    };
    is_address(authority.host())
        && after.is_some_and(|rest| rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_a_host_and_a_port_that_can_be() {
        for url in ["http://node7:8000", "https://a.example.org/scores", "http://10.0.0.1", "http://[::1]:8000"] {
            assert_eq!(check_url(url), Ok(()), "{url}");
        }
        for url in [
            "http:///x",
            "http://",
            "http://:8000",
            "http://[::1",
            "http://[::1:8000",
            "http://h:0",
            "http://h:99999",
            "http://h:",
            "http://h:x",
            "ftp://h",
            "h:8000",
            "http://a b",
            "http://h\n",
        ] {
            let refused = check_url(url).unwrap_err();
            assert!(refused.contains("must be the server's address"), "{refused}");
        }
    }

    #[test]
    fn secrets_where_they_would_be_shown_are_refused_and_not_shown() {
        for url in ["http://me:s3cret@node7:8000", "me:s3cret@node7:8000?s3cret", "https://node7:8000/a?key=s3cret"] {
            let config = RemoteConfig { url: url.into(), ..RemoteConfig::default() };
            let refused = config.check("remote", 600).unwrap_err();
            assert!(refused.starts_with("url = \"") && refused.contains("node7:8000"), "{refused}");
            assert!(!refused.contains("s3cret"), "{refused}");
        }
        let config = RemoteConfig { token_env: Some("s3cret/s3cret".into()), ..RemoteConfig::default() };
        let refused = config.token().unwrap_err();
        assert!(refused.contains("must be the name of the environment variable"), "{refused}");
        assert!(!refused.contains("s3cret"), "{refused}");
    }
}
