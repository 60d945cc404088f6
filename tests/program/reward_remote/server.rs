//! A server that does what a test tells it, good or bad.

use flowrl_dist::reward::{Remote, RemoteConfig};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What a server does with its n-th request, counted from 0.
#[derive(Clone)]
pub enum Does {
    /// Answers with status and body; `{n}` in the body is a score for each image, `{authorization}` what the client sent.
    Says(u16, String),
    /// Closes the connection without a word.
    HangsUp,
    /// Takes so long.
    Sleeps(Duration),
    /// Sends bytes without end.
    NeverEnds,
    /// Promises more than it sends.
    BreaksOff,
}

impl Does {
    /// Seconds until its client gives up: few where they have to pass, else more than a busy machine needs.
    pub fn timeout(&self) -> u64 {
        if matches!(self, Does::Sleeps(_)) { 2 } else { 60 }
    }
}

/// A server whose behaviour is a function of the request's number; health is always well unless `sick`.
pub struct Server {
    pub url: String,
    asked: Arc<AtomicUsize>,
    pub bodies: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub fn start(does: impl Fn(usize) -> Does + Send + Sync + 'static) -> Server {
        Server::start_with(r#"{"status": "ok"}"#.into(), does)
    }

    /// One that says which rewards it has, and scores nothing.
    pub fn serving(rewards: &[&str]) -> Server {
        Server::start_with(serde_json::json!({"status": "ok", "rewards": rewards}).to_string(), |_| Does::HangsUp)
    }

    fn start_with(health: String, does: impl Fn(usize) -> Does + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (asked, bodies) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let (count, log, does, health) = (asked.clone(), bodies.clone(), Arc::new(does), Arc::new(health));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (count, log, does, health) = (count.clone(), log.clone(), does.clone(), health.clone());
                std::thread::spawn(move || converse(stream.unwrap(), &count, &log, &health, &*does));
            }
        });
        Server { url, asked, bodies }
    }

    /// Its client, which is patient.
    pub fn remote(&self, settings: impl FnOnce(&mut RemoteConfig)) -> Remote {
        let mut config = RemoteConfig {
            url: self.url.clone(),
            reward: "good".into(),
            timeout_s: 60,
            retries: 1,
            batch: 2,
            ..RemoteConfig::default()
        };
        settings(&mut config);
        Remote::new(&config).unwrap()
    }

    /// Waits until it has been asked so often.
    pub fn until_asked(&self, times: usize) {
        let end = Instant::now() + Duration::from_secs(60);
        while self.asked() < times {
            assert!(Instant::now() < end, "asked {} times, not {times}", self.asked());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

/// Requests of one connection.
fn converse(
    stream: TcpStream,
    count: &AtomicUsize,
    log: &Mutex<Vec<String>>,
    health: &str,
    does: &(dyn Fn(usize) -> Does + Send + Sync),
) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    loop {
        let (mut first, mut length, mut authorization) = (String::new(), 0, String::new());
        if reader.read_line(&mut first).unwrap_or(0) == 0 {
            return;
        }
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.to_lowercase().starts_with("authorization:") {
                authorization = line.trim().to_string();
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let body = String::from_utf8(body).unwrap();
        let action = if first.starts_with("GET /health") {
            Does::Says(200, health.into())
        } else {
            log.lock().unwrap().push(body.clone());
            does(count.fetch_add(1, Ordering::SeqCst))
        };
        let images = body.matches("\"prompt\"").count();
        let header = |status: u16, length: usize| format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\n\r\n");
        let gone = match action {
            Does::Says(status, text) => {
                let text = text.replace("{n}", &vec![r#"{"good": 0.5}"#; images].join(", "));
                let text = text.replace("{authorization}", &authorization);
                write!(stream, "{}{text}", header(status, text.len())).is_err()
            }
            Does::HangsUp => true,
            Does::Sleeps(time) => {
                std::thread::sleep(time);
                true
            }
            Does::NeverEnds => {
                let _ = write!(stream, "HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n");
                let chunk = format!("10000\r\n{}\r\n", "7".repeat(0x10000));
                while stream.write_all(chunk.as_bytes()).is_ok() {}
                true
            }
            Does::BreaksOff => {
                let _ = write!(stream, "{}{{\"results\": [", header(200, 1000));
                true
            }
        };
        if gone {
            return;
        }
    }
}
