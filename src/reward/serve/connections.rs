//! Connections of clients that may be slow, silent or many.

use super::STOP_TIME;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Connections at a time; clients beyond them wait in the system's queue.
const MOST_CONNECTIONS: usize = 512;
/// How long a connection may take to bring the head of its next request, and how many bytes that may have.
const HEAD_TIME: Duration = Duration::from_secs(10);
const HEAD_BYTES: usize = 64 << 10;
/// How long an answer may lie unread.
const UNREAD_TIME: Duration = Duration::from_secs(60);
/// The pause after a connection that could not be accepted: out of descriptors, for one.
const PAUSE: Duration = Duration::from_millis(500);

/// Answers clients until `stop`, then those whose requests are under way, for up to [`STOP_TIME`]; returns what is left of
/// that time.
///
/// # Errors
/// The listener cannot be used.
pub async fn serve(
    listener: std::net::TcpListener,
    router: Router,
    mut stop: oneshot::Receiver<()>,
) -> io::Result<Duration> {
    let listener = TcpListener::from_std(listener)?;
    let free = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let (stopping, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = &mut stop => break,
            accepted = accept(&listener, &free) => accepted,
        };
        match accepted {
            Ok((stream, slot)) => drop(connections.spawn(converse(stream, slot, router.clone(), stopped.clone()))),
            Err(error) => {
                tracing::warn!("a connection could not be accepted: {error}");
                sleep(PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    let since = Instant::now();
    stopping.send(true).ok();
    let ended = async { while connections.join_next().await.is_some() {} };
    if timeout(STOP_TIME, ended).await.is_err() {
        tracing::warn!("{} connections are still open after {} s: given up", connections.len(), STOP_TIME.as_secs());
        connections.shutdown().await;
    }
    Ok(STOP_TIME.saturating_sub(since.elapsed()))
}

/// The next client, when there is room for it.
async fn accept(listener: &TcpListener, free: &Arc<Semaphore>) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let slot = free.clone().acquire_owned().await.map_err(io::Error::other)?;
    Ok((listener.accept().await?.0, slot))
}

/// One request after another, until the client has no more, is too slow, or the server stops.
async fn converse(stream: TcpStream, _slot: OwnedSemaphorePermit, router: Router, mut stopped: watch::Receiver<bool>) {
    stream.set_nodelay(true).ok();
    SockRef::from(&stream).set_tcp_user_timeout(Some(UNREAD_TIME)).ok();
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(HEAD_BYTES);
    let mut connection = pin!(server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    tokio::select! {
        _ = connection.as_mut() => return, // what a client does wrong is its own concern
        _ = stopped.wait_for(|stopped| *stopped) => connection.as_mut().graceful_shutdown(),
    }
    connection.await.ok();
}
