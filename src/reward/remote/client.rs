//! One request to a reward server, tried as often as allowed.

use super::wire::{Answer, Item, WireFormat, one_line};
use crate::error::{Error, Result};
use crate::reward::Token;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use ureq::http::Response;
use ureq::{Agent, RequestBuilder};

/// Seconds to wait for a connection, at most.
const CONNECT_S: u64 = 10;
/// The pause before the second attempt, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE_S: u64 = 8;
/// Bytes of an answer that are read at most, beside those for each image.
const ANSWER: u64 = 1 << 16;
const ANSWER_PER_IMAGE: u64 = 1 << 12;

/// Seconds that a request can take with its retries if the server is silent, and the pauses.
pub fn longest_s(timeout_s: u64, retries: u32) -> u64 {
    let retries = u64::from(retries);
    (retries + 1).saturating_mul(timeout_s).saturating_add(retries * LONGEST_PAUSE_S * 3 / 2)
}

/// Talks to one server about one reward.
#[derive(Debug)]
pub(super) struct Client {
    pub url: String,
    pub reward: String,
    pub format: WireFormat,
    pub retries: u32,
    token: Option<Token>,
    agent: Agent,
}

/// Why a request came to nothing.
struct Failure {
    message: String,
    /// Whether the same request may succeed later.
    passing: bool,
}

impl Client {
    pub fn new(
        url: &str,
        reward: &str,
        format: WireFormat,
        (timeout, retries, connections): (Duration, u32, usize),
        token: Option<Token>,
    ) -> Self {
        let agent = Agent::config_builder()
            .timeout_global(Some(timeout))
            .timeout_connect(Some(timeout.min(Duration::from_secs(CONNECT_S))))
            .proxy(None) // the environment's is for the web: it would be asked for 127.0.0.1, too
            .http_status_as_error(false)
            .max_redirects(0)
            .max_idle_connections_per_host(connections)
            .max_idle_connections(connections)
            .user_agent(concat!("flowrl-dist/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let url = url.trim_end_matches('/').to_string();
        Self { url, reward: reward.to_string(), format, retries, token, agent }
    }

    /// Whether the server answers, and, if it says which rewards it has, has this one.
    ///
    /// # Errors
    /// [`Error::Reward`]: the server does not answer; [`Error::Usage`]: it has no such reward.
    pub fn health(&self) -> Result<()> {
        let ask = || {
            let request = self.agent.get(format!("{}/health", self.url));
            self.body(self.authorized(request).call(), ANSWER)
        };
        let answer = self.tried(ask).map_err(|message| {
            self.error(format!("{message}; start the server, or take the reward out of the configuration"))
        })?;
        let served = serde_json::from_slice::<serde_json::Value>(&answer).ok();
        let served = served.as_ref().and_then(|health| health.get("rewards")).and_then(|rewards| rewards.as_array());
        let name = self.reward.split('/').next().unwrap_or_default();
        match served {
            Some(served) if !served.iter().any(|reward| reward == name) => {
                let names: Vec<&str> = served.iter().filter_map(|reward| reward.as_str()).collect();
                Err(Error::Usage(format!(
                    "reward {}: {}: the server has no such reward, but {}; name one of them",
                    self.reward,
                    self.url,
                    one_line(&names.join(", "))
                )))
            }
            _ => Ok(()),
        }
    }

    /// The answers for the items, in their order. Items that the server could not score are asked for again, alone, until
    /// the attempts are used up: out of memory, for one, passes.
    ///
    /// # Errors
    /// What the last attempt came to, in words, if no attempt was answered.
    pub fn answers(&self, items: &[Item]) -> std::result::Result<Vec<Answer>, String> {
        let mut answers: Vec<Option<Answer>> = vec![None; items.len()];
        let tried = self.tried(|| {
            let open = |(_, answer): &(usize, &Option<Answer>)| matches!(answer, None | Some(Answer::Failed(_)));
            let places: Vec<usize> = answers.iter().enumerate().filter(open).map(|(place, _)| place).collect();
            let asked: Vec<&Item> = places.iter().map(|&place| &items[place]).collect();
            let mut failed = None;
            for (place, answer) in places.into_iter().zip(self.once(&asked)?) {
                if let Answer::Failed(message) = &answer {
                    failed.get_or_insert_with(|| message.clone());
                }
                answers[place] = Some(answer);
            }
            failed.map_or(Ok(()), |message| Err(Failure { message, passing: true }))
        });
        match answers.into_iter().collect::<Option<Vec<Answer>>>() {
            Some(answers) => Ok(answers),
            None => Err(tried.err().unwrap_or_default()),
        }
    }

    /// One request.
    fn once(&self, items: &[&Item]) -> std::result::Result<Vec<Answer>, Failure> {
        let sent = self.format.request(&self.reward, items).to_string();
        let limit = ANSWER + ANSWER_PER_IMAGE * items.len() as u64;
        let request = self.agent.post(format!("{}/{}", self.url, self.format.path()));
        let request = request.header("Content-Type", "application/json");
        let body = self.body(self.authorized(request).send(&sent), limit)?;
        let wrong = |message| Failure { message, passing: true };
        self.format.answers(&body, &self.reward, items.len()).map_err(wrong)
    }

    /// A request with the token, if there is one.
    fn authorized<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match self.token.as_ref().and_then(Token::authorization) {
            Some(value) => request.header("Authorization", value),
            None => request,
        }
    }

    /// The body of a good answer, up to `limit` bytes, without the token wherever the server repeats it.
    fn body(
        &self,
        response: std::result::Result<Response<ureq::Body>, ureq::Error>,
        limit: u64,
    ) -> std::result::Result<Vec<u8>, Failure> {
        let passing = |message: String| Failure { message, passing: true };
        let mut response = response.map_err(|error| Failure {
            passing: !matches!(error, ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::HostNotFound),
            message: words(&error),
        })?;
        let status = response.status();
        let read = response.body_mut().with_config().limit(limit).read_to_vec();
        let read = read.map(|body| match &self.token {
            Some(token) => token.hidden_in(body),
            None => body,
        });
        if !status.is_success() {
            let said = one_line(&String::from_utf8_lossy(&read.unwrap_or_default()));
            let remedy = match status.as_u16() {
                401 | 403 => "; set token_env to the variable that holds the server's token",
                404 => "; is its format another one?",
                413 => "; use a smaller batch",
                _ => "",
            };
            // Too many requests, a timeout on the way, and everything that is the server's own fault may pass.
            let passing = matches!(status.as_u16(), 408 | 429) || status.is_server_error();
            return Err(Failure { message: format!("it answers {status}: {said}{remedy}"), passing });
        }
        read.map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => passing(format!("its answer is longer than {limit} bytes")),
            error => passing(words(&error)),
        })
    }

    /// Tries until it succeeds, cannot succeed, or has been tried often enough; each pause is twice the last, and a
    /// random half more or less, so that the ranks do not come back all at once.
    fn tried<T>(&self, mut attempt: impl FnMut() -> std::result::Result<T, Failure>) -> std::result::Result<T, String> {
        let mut pause = FIRST_PAUSE;
        for tries in 1.. {
            let Failure { message, passing } = match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if !passing || tries > self.retries {
                let times = if tries == 1 { String::new() } else { format!(" ({tries} attempts)") };
                return Err(format!("{message}{times}"));
            }
            tracing::debug!("reward {}: {}: attempt {tries}: {message}", self.reward, self.url);
            std::thread::sleep(pause.mul_f64(0.5 + jitter()));
            pause = (2 * pause).min(Duration::from_secs(LONGEST_PAUSE_S));
        }
        Err("was never tried".to_string()) // `tries` has no end
    }

    /// An error that names reward and server.
    pub fn error(&self, message: String) -> Error {
        Error::Reward { name: self.reward.clone(), message: format!("{}: {message}", self.url) }
    }
}

/// A number in [0, 1) that differs from process to process; nothing that is computed depends on it.
fn jitter() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    f64::from(now.wrapping_mul(2_654_435_761) ^ std::process::id().rotate_left(16)) / 4_294_967_296.0
}

/// What the client says of a failure, in the user's words.
fn words(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(_) => format!("no answer in time ({error})"),
        ureq::Error::Io(error) => format!("{error}"),
        error => error.to_string(),
    }
}
