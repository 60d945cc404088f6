//! `[[reward]]`: which rewards there are, and their keys.

use super::remote::{OnFailure, WireFormat};
use super::{Fit, Token};
use crate::data::Prompt;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::path::PathBuf;

/// Which rewards there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RewardKind {
    /// Does the picture read as the text in the prompt's double quotes? [`Ocr`](super::Ocr), 0 to 1.
    Ocr,
    /// Has the picture the glyph prompt's ink and ground? [`ColourMatch`](super::ColourMatch), 0, 0.5 or 1.
    Colour,
    /// Minus the size of the picture as a JPEG file in kB: [`Jpeg`](super::Jpeg).
    JpegCompressibility,
    /// The size of the picture as a JPEG file in kB: [`Jpeg`](super::Jpeg).
    JpegIncompressibility,
    /// [`Alignment::ClipScore`](super::Alignment::ClipScore).
    ClipScore,
    /// [`Alignment::PickScore`](super::Alignment::PickScore).
    PickScore,
    /// [`Alignment::Hps`](super::Alignment::Hps).
    Hps,
    /// [`Aesthetic`](super::Aesthetic).
    Aesthetic,
    /// What a server says: [`Remote`](super::Remote).
    Remote,
}

impl RewardKind {
    /// All of them.
    pub const ALL: [RewardKind; 9] = [
        RewardKind::Ocr,
        RewardKind::Colour,
        RewardKind::JpegCompressibility,
        RewardKind::JpegIncompressibility,
        RewardKind::ClipScore,
        RewardKind::PickScore,
        RewardKind::Hps,
        RewardKind::Aesthetic,
        RewardKind::Remote,
    ];

    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            RewardKind::Ocr => "ocr",
            RewardKind::Colour => "colour",
            RewardKind::JpegCompressibility => "jpeg-compressibility",
            RewardKind::JpegIncompressibility => "jpeg-incompressibility",
            RewardKind::ClipScore => "clip-score",
            RewardKind::PickScore => "pick-score",
            RewardKind::Hps => "hps",
            RewardKind::Aesthetic => "aesthetic",
            RewardKind::Remote => "remote",
        }
    }

    /// Whether it applies to a prompt, as far as that can be said before there is a picture; needs none of its files.
    pub fn fit(self, prompt: &Prompt) -> Fit {
        match self {
            RewardKind::Ocr => super::ocr::fit(prompt),
            RewardKind::Colour => super::colour::fit(prompt),
            RewardKind::Remote => Fit::Unknown,
            _ => Fit::Yes,
        }
    }

    /// Whether it runs a model of the CLIP family from the user's files.
    pub(super) fn uses_clip(self) -> bool {
        matches!(self, RewardKind::ClipScore | RewardKind::PickScore | RewardKind::Hps | RewardKind::Aesthetic)
    }
}

/// One `[[reward]]` of the configuration. Keys beside name and weight belong to some rewards only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardConfig {
    /// The reward.
    pub name: RewardKind,
    /// What its score is multiplied by before the scores are summed.
    #[serde(default = "one")]
    pub weight: f64,
    /// CLIP family: the model's folder or file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// CLIP family: a folder with CLIP's tokenizer, if the model's has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// Aesthetic: the predictor's file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predictor: Option<PathBuf>,
    /// OCR: the model that finds text in large pictures; nothing: the whole picture is one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detector: Option<PathBuf>,
    /// Remote: where the server listens, such as `http://node7:8000`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Remote: the server's name for the reward; also its name in the metrics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward: Option<String>,
    /// Remote: the server's language; nothing: this program's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<WireFormat>,
    /// Remote: seconds that a request may take; nothing: 60.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
    /// Remote: attempts after the first one; nothing: 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
    /// Remote: images of a request; nothing: 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Remote: requests of a rank at a time; nothing: 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<usize>,
    /// Remote: the environment variable that holds the server's token; nothing: no token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_env: Option<String>,
    /// Remote: what becomes of the run when a score cannot be had; nothing: it stops.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_failure: Option<OnFailure>,
}

fn one() -> f64 {
    1.0
}

impl RewardConfig {
    /// A reward of weight 1 with nothing else said.
    pub fn new(name: RewardKind) -> Self {
        Self {
            name,
            weight: 1.0,
            path: None,
            tokenizer: None,
            predictor: None,
            detector: None,
            url: None,
            reward: None,
            format: None,
            timeout_s: None,
            retries: None,
            batch: None,
            connections: None,
            token_env: None,
            on_failure: None,
        }
    }

    /// Its name in the metrics.
    pub fn label(&self) -> &str {
        match (self.name, &self.reward) {
            (RewardKind::Remote, Some(reward)) => reward,
            (kind, _) => kind.name(),
        }
    }

    /// Forgets where a server is and how it is asked: the same reward somewhere else gives the same scores.
    pub fn forget_server(&mut self) {
        (self.url, self.timeout_s, self.retries, self.token_env) = (None, None, None, None);
        (self.batch, self.connections) = (None, None);
    }

    /// Whether everything that the reward needs is said, and nothing that it has no use for.
    ///
    /// # Errors
    /// One line: key, value, remedy. `deadline_s` is how long peers wait for a rank.
    pub fn check(&self, deadline_s: u64) -> Result<(), String> {
        if !self.weight.is_finite() {
            return Err(format!("weight = {}: must be a finite number, such as 1.0", self.weight));
        }
        self.url.as_deref().map_or(Ok(()), check_url)?; // before any message that shows it
        let clip = self.name.uses_clip();
        let (aesthetic, remote) = (self.name == RewardKind::Aesthetic, self.name == RewardKind::Remote);
        let family = "clip-score, pick-score, hps, aesthetic";
        self.only("path", &self.path, clip, family)?;
        self.only("tokenizer", &self.tokenizer, clip, family)?;
        self.only("predictor", &self.predictor, aesthetic, "aesthetic")?;
        self.only("detector", &self.detector, self.name == RewardKind::Ocr, "ocr")?;
        self.only("url", &self.url, remote, "remote")?;
        self.only("reward", &self.reward, remote, "remote")?;
        self.only("format", &self.format, remote, "remote")?;
        self.only("timeout_s", &self.timeout_s, remote, "remote")?;
        self.only("retries", &self.retries, remote, "remote")?;
        self.only("batch", &self.batch, remote, "remote")?;
        self.only("connections", &self.connections, remote, "remote")?;
        self.only("token_env", &self.token_env, remote, "remote")?;
        self.only("on_failure", &self.on_failure, remote, "remote")?;
        if clip && self.path.is_none() {
            return Err(self.lacks("path", "the folder or file of its model"));
        }
        if aesthetic && self.predictor.is_none() {
            return Err(self.lacks("predictor", "sac+logos+ava1-l14-linearMSE.pth of LAION"));
        }
        if remote { self.check_remote(deadline_s) } else { Ok(()) }
    }

    /// Whether the files that it names and the token's variable are there; a plan needs none of them.
    ///
    /// # Errors
    /// One line: key, value, remedy.
    pub fn check_files(&self) -> Result<(), String> {
        let absent = |key: &str, path: &Option<PathBuf>, remedy: &str| match path {
            Some(path) if !path.exists() => Err(format!("{key} = {path:?}: there is nothing at this path; {remedy}")),
            _ => Ok(()),
        };
        absent("path", &self.path, "give the folder or file of its model")?;
        absent("tokenizer", &self.tokenizer, "give the folder of CLIP's tokenizer")?;
        absent("predictor", &self.predictor, "give sac+logos+ava1-l14-linearMSE.pth of LAION")?;
        absent("detector", &self.detector, "launch/fetch-ocr.sh fetches it")?;
        self.token().map(drop)
    }

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

    fn check_remote(&self, deadline_s: u64) -> Result<(), String> {
        if self.url.is_none() {
            return Err(self.lacks("url", "the server's address such as \"http://node7:8000\""));
        }
        if self.reward.is_none() {
            return Err(self.lacks("reward", "the server's name for the reward such as \"geneval\""));
        }
        if self.reward.as_deref().unwrap_or_default().trim().is_empty() {
            return Err("reward = \"\": must be the server's name for the reward, such as \"geneval\"".into());
        }
        let counts = [("batch", self.batch, 4096), ("connections", self.connections, 64)];
        for (key, value, most) in counts {
            if let Some(value) = value.filter(|value| !(1..=most).contains(value)) {
                return Err(format!("{key} = {value}: must be from 1 to {most}"));
            }
        }
        if let Some(retries) = self.retries.filter(|&retries| retries > 100) {
            return Err(format!("retries = {retries}: must be at most 100"));
        }
        let timeout = self.timeout_s.unwrap_or(super::remote::TIMEOUT_S);
        if timeout == 0 {
            return Err("timeout_s = 0: must be at least 1".into());
        }
        let held = super::remote::longest_s(timeout, self.retries.unwrap_or(super::remote::RETRIES));
        if held >= deadline_s {
            return Err(format!(
                "timeout_s = {timeout}: a silent server would hold a rank for {held} s with its retries, and \
                 parallel.deadline_s = {deadline_s} ends the job before; use a shorter time, fewer retries, or a longer deadline"
            ));
        }
        Ok(())
    }

    fn lacks(&self, key: &str, what: &str) -> String {
        format!("name = {:?}: needs {key}, {what}; add it", self.name.name())
    }

    /// A key of some rewards is a mistake with another.
    fn only<T: Debug>(&self, key: &str, value: &Option<T>, belongs: bool, owners: &str) -> Result<(), String> {
        match value {
            Some(value) if !belongs => Err(format!("{key} = {value:?}: belongs to {owners}; remove it here")),
            _ => Ok(()),
        }
    }
}

/// Whether it is the address of a server, without a secret in it, which logs and config.toml would show.
fn check_url(url: &str) -> Result<(), String> {
    if let Some((_, host)) = url.rsplit_once('@') {
        return Err(format!(
            "url = \"...@{}\": has a user or password in it, which logs and files would show; give the server a token, and name \
             the variable that holds it in token_env",
            host.split(['?', '#']).next().unwrap_or_default()
        ));
    }
    if let Some((address, _)) = url.split_once(['?', '#']) {
        return Err(format!("url = \"{address}?...\": must end before ? and #: paths are added to it"));
    }
    let host = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    match host {
        Some(host) if !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || c.is_control()) => Ok(()),
        _ => Err(format!("url = {url:?}: must be the server's address, such as \"http://node7:8000\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever reward they stand at, and whatever else is wrong with them.
    #[test]
    fn secrets_where_they_would_be_shown_are_refused_and_not_shown() {
        for kind in [RewardKind::Remote, RewardKind::Ocr] {
            for url in ["http://me:s3cret@node7:8000", "me:s3cret@node7:8000?s3cret", "https://node7:8000/a?key=s3cret"]
            {
                let config = RewardConfig { url: Some(url.into()), ..RewardConfig::new(kind) };
                let refused = config.check(600).unwrap_err();
                assert!(refused.starts_with("url = \"") && refused.contains("node7:8000"), "{refused}");
                assert!(!refused.contains("s3cret"), "{refused}");
            }
        }
        let config = RewardConfig { token_env: Some("s3cret/s3cret".into()), ..RewardConfig::new(RewardKind::Remote) };
        let refused = config.token().unwrap_err();
        assert!(
            refused.contains("must be the name of the environment variable") && !refused.contains("s3cret"),
            "{refused}"
        );
    }
}
