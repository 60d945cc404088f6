//! The body of a request, from a client that may be slow: it has a place among those in memory only once it is on its way,
//! and keeps up a least rate from then on, so that a slow one holds nobody else up.

use super::Refusal;
use axum::body::{Body, HttpBody};
use axum::http::StatusCode;
use std::future::poll_fn;
use std::pin::Pin;
use std::time::Duration;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

/// Bytes of a body, at most.
const MOST_BYTES: usize = 64 << 20;
/// Bytes that come before a body has its place: of all that may wait together some 16 MiB.
const FIRST_BYTES: usize = 64 << 10;
/// How long a body may take to arrive: this, and a second for each `LEAST_RATE` bytes that have come, up to `LONGEST`. The
/// time that it waits for its place does not count.
const GRACE: Duration = Duration::from_secs(5);
const LEAST_RATE: usize = 64 << 10;
const LONGEST: Duration = Duration::from_secs(60);

/// A body, and its place among those in memory.
///
/// # Errors
/// It is too long, too slow or broken off.
pub(super) async fn read(body: Body, in_memory: &Semaphore) -> Result<(Vec<u8>, SemaphorePermit<'_>), Refusal> {
    let mut arriving = Arriving { body, bytes: Vec::new(), taken: Duration::ZERO };
    let mut is_whole = false;
    while !is_whole && arriving.bytes.len() < FIRST_BYTES {
        is_whole = !arriving.go_on().await?;
    }
    let stops = |_| (StatusCode::SERVICE_UNAVAILABLE, "this server is about to stop".to_owned());
    let place = in_memory.acquire().await.map_err(stops)?;
    while !is_whole {
        is_whole = !arriving.go_on().await?;
    }
    Ok((arriving.bytes, place))
}

/// A body on its way.
struct Arriving {
    body: Body,
    /// What has come.
    bytes: Vec<u8>,
    /// How long that took.
    taken: Duration,
}

impl Arriving {
    /// Takes what comes next; false at the end.
    async fn go_on(&mut self) -> Result<bool, Refusal> {
        let since = Instant::now();
        let left = allowed(self.bytes.len()).saturating_sub(self.taken);
        let next = timeout(left, poll_fn(|context| Pin::new(&mut self.body).poll_frame(context))).await;
        let slow = |_| {
            let (longest, rate) = (LONGEST.as_secs(), LEAST_RATE >> 10);
            let message = format!("the body took over {longest} s, or came slower than {rate} KiB a second");
            (StatusCode::REQUEST_TIMEOUT, message)
        };
        self.taken += since.elapsed();
        let Some(frame) = next.map_err(slow)? else { return Ok(false) };
        let frame = frame.map_err(|error| (StatusCode::BAD_REQUEST, format!("the body broke off: {error}")))?;
        if let Ok(data) = frame.into_data() {
            self.check_length((self.bytes.len() + data.len()) as u64)?;
            self.bytes.extend_from_slice(&data);
        }
        Ok(true)
    }

    fn check_length(&self, length: u64) -> Result<(), Refusal> {
        match length <= MOST_BYTES as u64 {
            true => Ok(()),
            false => {
                let message = format!("a body of {length} bytes or more; send up to {} MiB", MOST_BYTES >> 20);
                Err((StatusCode::PAYLOAD_TOO_LARGE, message))
            }
        }
    }
}

/// How long a body of which so many bytes have come may have taken.
fn allowed(bytes: usize) -> Duration {
    LONGEST.min(GRACE + Duration::from_secs_f64(bytes as f64 / LEAST_RATE as f64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Poll;

    #[test]
    fn a_body_has_five_seconds_and_one_for_each_64_kib() {
        assert_eq!(allowed(0), Duration::from_secs(5));
        assert_eq!(allowed(128 << 10), Duration::from_secs(7));
        assert_eq!(allowed(64 << 20), Duration::from_secs(60));
    }

    /// A body of which one byte comes and then nothing.
    struct Stalled(bool);

    impl HttpBody for Stalled {
        type Data = axum::body::Bytes;
        type Error = std::io::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
            match std::mem::replace(&mut self.0, true) {
                false => Poll::Ready(Some(Ok(hyper::body::Frame::data("x".into())))),
                true => Poll::Pending,
            }
        }
    }

    /// Many bodies that do not come, and one that does: it has the only place at once.
    #[test]
    fn a_body_that_does_not_come_has_no_place() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let places = Semaphore::new(1);
            let stalled = async {
                tokio::join!(read(Body::new(Stalled(false)), &places), read(Body::new(Stalled(false)), &places))
            };
            let good = async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                timeout(Duration::from_secs(1), read(Body::from(vec![7; 3 * FIRST_BYTES]), &places)).await
            };
            tokio::select! {
                _ = stalled => panic!("they ended first"),
                good = good => assert_eq!(good.unwrap().unwrap().0, vec![7; 3 * FIRST_BYTES]),
            }
            let long = Body::from(vec![0; MOST_BYTES + 1]);
            let refused = read(long, &places).await.unwrap_err();
            assert!(refused.0 == 413 && refused.1.contains("send up to 64 MiB"), "{refused:?}");
        });
    }
}
