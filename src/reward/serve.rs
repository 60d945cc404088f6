//! A server for rewards, in the language of this program's own client ([`super::Remote`]).

use super::Reward;
use crate::data::{Metadata, Prompt};
use crate::error::{Error, Result};
use axum::body::{Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candle_core::{Device, Tensor};
use image::{ImageFormat, ImageReader, Limits, RgbImage};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::Cursor;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use tokio::sync::{Semaphore, oneshot};

/// Bytes of a request's body, at most.
const MOST_BYTES: usize = 64 << 20;
/// Images of a request, and pixels on a side of one, at most.
const MOST_IMAGES: usize = 1024;
const MOST_PIXELS: u32 = 4096;
/// Requests whose bodies are in memory at a time, and those that may wait beside.
const IN_MEMORY: usize = 4;
const WAITING: usize = 256;
/// How long a body may take to arrive, and requests under way to end once the server is asked to stop.
const BODY_TIME: Duration = Duration::from_secs(60);
const STOP_TIME: Duration = Duration::from_secs(60);

/// Serves `rewards` on `listener` until `stop` says so; requests under way are answered first. Images are scored on the
/// calling thread, one request after another, while the next ones arrive.
///
/// # Errors
/// [`Error::Failed`]: the server cannot be started.
pub fn serve(
    rewards: &[Box<dyn Reward>],
    listener: TcpListener,
    token: Option<&str>,
    stop: oneshot::Receiver<()>,
) -> Result<()> {
    let failed = |error: std::io::Error| Error::Failed(format!("the reward server cannot be started: {error}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(failed)?;
    let (jobs, work) = channel();
    let shared = Arc::new(Shared {
        names: rewards.iter().map(|reward| reward.name().to_string()).collect(),
        token: token.map(|token| blake3::hash(token.as_bytes())),
        jobs,
        in_memory: Semaphore::new(IN_MEMORY),
        waiting: Semaphore::new(IN_MEMORY + WAITING),
    });
    let router = Router::new().route("/health", get(health)).route("/score", post(score)).with_state(shared);
    runtime.spawn(async move {
        let listener = match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => return tracing::error!("the reward server cannot be started: {error}"),
        };
        let (begun, begin) = oneshot::channel();
        let stopped = async move {
            stop.await.ok();
            begun.send(()).ok();
        };
        let server = axum::serve(listener, router).with_graceful_shutdown(stopped);
        let late = async move {
            begin.await.ok();
            tokio::time::sleep(STOP_TIME).await;
        };
        tokio::select! {
            ended = server => if let Err(error) = ended { tracing::error!("the reward server ended: {error}") },
            () = late => tracing::warn!("requests under way after {} s are given up", STOP_TIME.as_secs()),
        }
    });
    // The router, and the sender in it, go with the server: then there is no more work.
    score_all(rewards, &work);
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(())
}

/// Scores requests as long as some come; those whose client has gone meanwhile are passed over.
fn score_all(rewards: &[Box<dyn Reward>], work: &Receiver<Job>) {
    while let Ok(job) = work.recv() {
        if job.reply.is_closed() {
            continue;
        }
        let answer = answer(rewards, &job.body);
        job.reply.send(answer).ok();
    }
}

struct Shared {
    names: Vec<String>,
    token: Option<blake3::Hash>,
    jobs: Sender<Job>,
    in_memory: Semaphore,
    waiting: Semaphore,
}

/// A request to be scored.
struct Job {
    body: Bytes,
    reply: oneshot::Sender<std::result::Result<Value, Refusal>>,
}

/// Why a request is not answered.
type Refusal = (StatusCode, String);

fn refused((status, message): Refusal) -> Response {
    (status, Json(json!({"error": message}))).into_response()
}

impl Shared {
    /// Whether the request has the token; compared by digest, in constant time.
    fn allows(&self, headers: &HeaderMap) -> std::result::Result<(), Refusal> {
        let Some(token) = &self.token else { return Ok(()) };
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        match given.and_then(|given| given.strip_prefix("Bearer ")) {
            Some(given) if blake3::hash(given.as_bytes()) == *token => Ok(()),
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
    let _in_memory = shared.in_memory.acquire().await.map_err(|_| stops())?;
    let body = tokio::time::timeout(BODY_TIME, to_bytes(request.into_body(), MOST_BYTES)).await;
    let body =
        body.map_err(|_| (StatusCode::REQUEST_TIMEOUT, format!("the body took over {} s", BODY_TIME.as_secs())))?;
    let too_long = |error| (StatusCode::PAYLOAD_TOO_LARGE, format!("{error}; send up to {} MiB", MOST_BYTES >> 20));
    let body = body.map_err(too_long)?;
    let (reply, answer) = oneshot::channel();
    shared.jobs.send(Job { body, reply }).map_err(|_| stops())?;
    answer.await.map_err(|_| stops())?
}

/// An image's number in its request, the image, and its prompt.
type Asked = (usize, RgbImage, Prompt);

/// The body of a request.
#[derive(Deserialize)]
struct Body {
    requests: Vec<One>,
    rewards: Vec<String>,
}

#[derive(Deserialize)]
struct One {
    prompt: String,
    image_png_b64: String,
    #[serde(default)]
    metadata: Option<Map<String, Value>>,
}

/// `{"results": [{name: score or null}], "errors": [null or {name: text}]}` of a request's body.
fn answer(rewards: &[Box<dyn Reward>], body: &[u8]) -> std::result::Result<Value, Refusal> {
    let bad = |message: String| (StatusCode::BAD_REQUEST, message);
    let body: Body = serde_json::from_slice(body).map_err(|error| bad(error.to_string()))?;
    if body.requests.len() > MOST_IMAGES {
        return Err(bad(format!("{} images in a request; send up to {MOST_IMAGES}", body.requests.len())));
    }
    let wanted = body.rewards.iter().map(|name| {
        let found = rewards.iter().find(|reward| reward.name() == name);
        let names = || rewards.iter().map(|reward| reward.name()).collect::<Vec<_>>().join(", ");
        found.ok_or_else(|| bad(format!("there is no reward {name:?}, but {}", names())))
    });
    let wanted = wanted.collect::<std::result::Result<Vec<_>, _>>()?;

    let mut results = vec![Map::new(); body.requests.len()];
    let mut errors = vec![Map::new(); body.requests.len()];
    // Images of one size are scored together.
    let mut sizes: BTreeMap<(u32, u32), Vec<Asked>> = BTreeMap::new();
    for (i, request) in body.requests.into_iter().enumerate() {
        match picture(&request.image_png_b64) {
            Ok(picture) => {
                let metadata = request.metadata.map(Metadata::new);
                let prompt = Prompt { metadata, ..Prompt::new(i, request.prompt) };
                sizes.entry(picture.dimensions()).or_default().push((i, picture, prompt));
            }
            Err(message) => wanted.iter().for_each(|reward| {
                errors[i].insert(reward.name().to_string(), message.clone().into());
            }),
        }
    }
    for alike in sizes.into_values() {
        let prompts: Vec<Prompt> = alike.iter().map(|(_, _, prompt)| prompt.clone()).collect();
        for reward in &wanted {
            let name = || reward.name().to_string();
            match images(&alike).and_then(|images| reward.score(&images, &prompts)) {
                Ok(scores) => alike.iter().zip(scores).for_each(|((i, ..), score)| {
                    match score {
                        Some(score) if !score.is_finite() => {
                            errors[*i].insert(name(), format!("the score is {score}").into())
                        }
                        score => results[*i].insert(name(), score.into()),
                    };
                }),
                Err(error) => alike.iter().for_each(|(i, ..)| {
                    errors[*i].insert(name(), error.to_string().into());
                }),
            }
        }
    }
    let errors: Vec<Value> = errors.into_iter().map(|e| if e.is_empty() { Value::Null } else { e.into() }).collect();
    Ok(json!({"results": results, "errors": errors}))
}

/// A PNG picture, or what is wrong with it.
fn picture(base64: &str) -> std::result::Result<RgbImage, String> {
    let bytes = STANDARD.decode(base64).map_err(|error| format!("the image is not base64: {error}"))?;
    let mut reader = ImageReader::with_format(Cursor::new(bytes), ImageFormat::Png);
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(MOST_PIXELS), Some(MOST_PIXELS));
    reader.limits(limits);
    reader.decode().map(|image| image.to_rgb8()).map_err(|error| format!("the image is no PNG: {error}"))
}

/// Pictures of one size as `[B, 3, H, W]` in [0, 1].
fn images(alike: &[Asked]) -> Result<Tensor> {
    let (width, height) = alike[0].1.dimensions();
    let values: Vec<f32> =
        alike.iter().flat_map(|(_, picture, _)| picture.as_raw()).map(|&byte| f32::from(byte) / 255.0).collect();
    let images = Tensor::from_vec(values, (alike.len(), height as usize, width as usize, 3), &Device::Cpu)?;
    Ok(images.permute((0, 3, 1, 2))?.contiguous()?)
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
    use std::sync::Mutex;

    /// Remembers the prompts that it was asked to score.
    struct Remembers(Arc<Mutex<Vec<String>>>);

    impl Reward for Remembers {
        fn name(&self) -> &str {
            "remembers"
        }

        fn score(&self, _: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
            let mut seen = self.0.lock().map_err(|e| Error::Failed(e.to_string()))?;
            seen.extend(prompts.iter().map(|prompt| prompt.text.clone()));
            Ok(vec![Some(1.0); prompts.len()])
        }
    }

    /// A client that gave up asks again: scoring what it left behind would only make the next answer late as well.
    #[test]
    fn requests_whose_client_has_gone_are_not_scored() {
        let mut png = Cursor::new(Vec::new());
        RgbImage::new(8, 8).write_to(&mut png, ImageFormat::Png).unwrap();
        let picture = STANDARD.encode(png.into_inner());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let rewards: [Box<dyn Reward>; 1] = [Box::new(Remembers(seen.clone()))];
        let (jobs, work) = channel();
        let ask = |prompt: &str| {
            let request = json!({"prompt": prompt, "image_png_b64": picture});
            let body = json!({"requests": [request], "rewards": ["remembers"]}).to_string().into();
            let (reply, answer) = oneshot::channel();
            jobs.send(Job { body, reply }).unwrap();
            answer
        };
        let first = ask("waits");
        drop(ask("has gone"));
        let last = ask("waits, too");
        drop(jobs);
        score_all(&rewards, &work);
        assert_eq!(*seen.lock().unwrap(), ["waits", "waits, too"]);
        for answer in [first, last] {
            assert_eq!(answer.blocking_recv().unwrap().unwrap()["results"], json!([{"remembers": 1.0}]));
        }
    }
}
