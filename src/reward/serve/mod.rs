//! A server for rewards, in the language of this program's own client ([`super::Remote`]).
//!
//! Whatever its clients send, or leave unsent, it takes bounded memory and ends in bounded time: the bounds stand in
//! `connections` (who may ask, how slowly), here (requests), in `body` (how long and how slow) and in `answer` (images).

mod answer;
mod body;
mod connections;

use super::token::Token;
use super::{Reward, Rewards};
use crate::error::{Error, Result};
use answer::answer;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::net::{SocketAddr, TcpListener};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use tokio::sync::{Semaphore, oneshot};

/// Requests whose bodies are in memory at a time, and those that may wait beside.
const IN_MEMORY: usize = 4;
const WAITING: usize = 256;
/// How long requests under way may take to end once the server is asked to stop: less than the 30 s that batch systems
/// and container engines wait before they kill.
const STOP_TIME: Duration = Duration::from_secs(20);

/// Serves `rewards` on `listener` until `stop` says so; requests under way are answered first, within `STOP_TIME`.
/// Images are scored on one thread, one request after another, while the next ones arrive.
///
/// # Errors
/// [`Error::Failed`]: the server cannot be started.
pub fn serve(rewards: Rewards, listener: TcpListener, token: Option<Token>, stop: oneshot::Receiver<()>) -> Result<()> {
    let failed = |error: std::io::Error| Error::Failed(format!("the reward server cannot be started: {error}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(failed)?;
    let (jobs, work) = channel();
    let shared = Arc::new(Shared {
        names: rewards.iter().map(|reward| reward.name().to_string()).collect(),
        token,
        jobs,
        in_memory: Semaphore::new(IN_MEMORY),
        waiting: Semaphore::new(IN_MEMORY + WAITING),
    });
    let (scoring, scored) = channel::<()>();
    let score_all = move || {
        score_all(&rewards, &work);
        drop(scoring);
    };
    std::thread::Builder::new().name("scorer".into()).spawn(score_all).map_err(failed)?;
    let router = Router::new().route("/health", get(health)).route("/score", post(score)).with_state(shared);
    // Returns with every connection closed. The senders of work go with them: then the scorer ends after what it has begun.
    let left = runtime.block_on(connections::serve(listener, router, stop)).map_err(failed)?;
    runtime.shutdown_background();
    scored.recv_timeout(left).ok();
    Ok(())
}

/// Scores requests as long as some come; those whose client has gone meanwhile are passed over.
fn score_all(rewards: &[Box<dyn Reward>], work: &Receiver<Job>) {
    while let Ok(Job { body, reply }) = work.recv() {
        let panicked =
            |_| (StatusCode::INTERNAL_SERVER_ERROR, "a reward panicked; the server's own words say why".into());
        let scored = catch_unwind(AssertUnwindSafe(|| answer(rewards, &body, &|| reply.is_closed())));
        reply.send(scored.unwrap_or_else(|panic| Err(panicked(panic)))).ok();
    }
}

struct Shared {
    names: Vec<String>,
    token: Option<Token>,
    jobs: Sender<Job>,
    in_memory: Semaphore,
    waiting: Semaphore,
}

/// A request to be scored.
struct Job {
    body: Vec<u8>,
    reply: oneshot::Sender<std::result::Result<Value, Refusal>>,
}

/// Why a request is not answered.
type Refusal = (StatusCode, String);

fn refused((status, message): Refusal) -> Response {
    (status, Json(json!({"error": message}))).into_response()
}

impl Shared {
    /// Whether the request has the token.
    fn allows(&self, headers: &HeaderMap) -> std::result::Result<(), Refusal> {
        let Some(token) = &self.token else { return Ok(()) };
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        // The scheme's letters may be of either case (RFC 9110, 11.1).
        match given.and_then(|given| given.split_once(' ')) {
            Some((scheme, given)) if scheme.eq_ignore_ascii_case("bearer") && token.is(given) => Ok(()),
            _ => Err((StatusCode::UNAUTHORIZED, "this server wants its token, as Authorization: Bearer ...".into())),
        }
    }
}

async fn health(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    match shared.allows(&headers) {
        Ok(()) => Json(json!({"status": "ok", "rewards": shared.names})).into_response(),
        Err(refusal) => refused(refusal),
    }
}

async fn score(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    match scored(&shared, request).await {
        Ok(answer) => Json(answer).into_response(),
        Err(refusal) => refused(refusal),
    }
}

async fn scored(shared: &Shared, request: Request) -> std::result::Result<Value, Refusal> {
    shared.allows(request.headers())?;
    let busy = |_| (StatusCode::SERVICE_UNAVAILABLE, format!("more than {WAITING} requests wait; try again later"));
    let _waits = shared.waiting.try_acquire().map_err(busy)?;
    let stops = || (StatusCode::SERVICE_UNAVAILABLE, "this server is about to stop".to_string());
    let (body, _place) = body::read(request.into_body(), &shared.in_memory).await?;
    let (reply, answer) = oneshot::channel();
    shared.jobs.send(Job { body, reply }).map_err(|_| stops())?;
    answer.await.map_err(|_| stops())?
}

/// Opens the address to listen at. Without a token only this machine may ask.
///
/// # Errors
/// [`Error::Usage`]: the address cannot be had, or is open to others without a token.
pub fn listen(address: &str, has_token: bool) -> Result<(TcpListener, SocketAddr)> {
    let usage = |message: String| Error::Usage(format!("--listen {address}: {message}"));
    let listener = TcpListener::bind(address)
        .map_err(|error| usage(format!("{error}; give HOST:PORT of this machine, such as 127.0.0.1:8000")))?;
    let at = listener.local_addr().map_err(|error| usage(error.to_string()))?;
    if !has_token && !at.ip().is_loopback() {
        return Err(usage("other machines could ask this server; give --token-file, or listen at 127.0.0.1".into()));
    }
    Ok((listener, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Prompt;
    use answer::tests::{asking, flat};
    use candle_core::Tensor;
    use std::sync::Mutex;

    /// Remembers the prompts that it was asked to score, and panics where one says so.
    struct Remembers(Arc<Mutex<Vec<String>>>);

    impl Reward for Remembers {
        fn name(&self) -> &str {
            "remembers"
        }

        fn score(&self, _: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
            assert!(prompts.iter().all(|prompt| &*prompt.text != "panic"));
            let mut seen = self.0.lock().map_err(|e| Error::Failed(e.to_string()))?;
            seen.extend(prompts.iter().map(|prompt| prompt.text.to_string()));
            Ok(vec![Some(1.0); prompts.len()])
        }
    }

    /// A client that gave up asks again: scoring what it left behind would only make the next answer late as well. A reward
    /// that panics costs its request alone.
    #[test]
    fn requests_whose_client_has_gone_are_not_scored() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let rewards: [Box<dyn Reward>; 1] = [Box::new(Remembers(seen.clone()))];
        let (jobs, work) = channel();
        let ask = |prompt: &str| {
            let (reply, answer) = oneshot::channel();
            let body = asking(&[(prompt, flat(8, 8))], &["remembers"]);
            jobs.send(Job { body, reply }).unwrap();
            answer
        };
        let first = ask("waits");
        drop(ask("has gone"));
        let panics = ask("panic");
        let last = ask("waits, too");
        drop(jobs);
        score_all(&rewards, &work);
        assert_eq!(*seen.lock().unwrap(), ["waits", "waits, too"]);
        assert_eq!(panics.blocking_recv().unwrap().unwrap_err().0, StatusCode::INTERNAL_SERVER_ERROR);
        for answer in [first, last] {
            assert_eq!(answer.blocking_recv().unwrap().unwrap()["results"], json!([{"remembers": 1.0}]));
        }
    }
}
