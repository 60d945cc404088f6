//! The program `serve-reward`: its token, its limits, its end.

use serde_json::Value;
use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// A server of JPEG sizes at a port of its own choice; dropped, it is killed.
struct Serving {
    child: Child,
    stderr: BufReader<ChildStderr>,
    address: String,
}

impl Serving {
    fn start(arguments: &[&str]) -> Serving {
        let mut child = Command::new(env!("CARGO_BIN_EXE_flowrl-dist"))
            .args(["serve-reward", "--reward", "jpeg-incompressibility", "--listen", "127.0.0.1:0"])
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let mut serving = Serving { child, stderr, address: String::new() };
        if arguments.contains(&"cpu") {
            serving.says("models compute on the CPU");
        }
        let said = serving.says("serving jpeg-incompressibility at http://");
        serving.address = said.rsplit_once("http://").unwrap().1.trim().to_string();
        serving
    }

    /// The next line that contains `part`.
    fn says(&mut self, part: &str) -> String {
        let mut all = String::new();
        loop {
            let mut line = String::new();
            assert!(self.stderr.read_line(&mut line).unwrap() > 0, "it ended without {part:?}: {all}");
            if line.contains(part) {
                return line;
            }
            all.push_str(&line);
        }
    }

    /// Sends SIGTERM, and waits until it has been seen.
    fn terminate(&mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.says("signal 15: answering what was asked, then stopping");
    }

    /// Waits for its end; its exit code.
    fn ends(&mut self) -> Option<i32> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < end, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Status and body of the answer to a request with these lines in its head.
    fn ask(&self, first: &str, lines: &str, body: &[u8]) -> (u16, String) {
        let mut stream = self.connect();
        write!(stream, "{first} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{lines}").unwrap();
        write!(stream, "Content-Length: {}\r\n\r\n", body.len()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_string())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A picture of one colour.
fn asking() -> String {
    let mut file = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_pixel(16, 16, image::Rgb([9, 99, 199])).write_to(&mut file, image::ImageFormat::Png).unwrap();
    use base64::Engine;
    let picture = base64::engine::general_purpose::STANDARD.encode(file.into_inner());
    format!(
        r#"{{"requests": [{{"prompt": "blue", "image_png_b64": "{picture}"}}], "rewards": ["jpeg-incompressibility"]}}"#
    )
}

fn score(answer: &str) -> Option<f64> {
    let answer: Value = serde_json::from_str(answer).unwrap_or_else(|_| panic!("{answer}"));
    answer["results"][0]["jpeg-incompressibility"].as_f64()
}

#[test]
fn only_who_has_the_token_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    secret(&file, "open-sesame-1234\n");
    let serving = Serving::start(&["--token-file", path(&file), "--device", "cpu"]);
    let body = asking();
    for (given, status) in [
        ("", 401),
        ("Authorization: Bearer open-sesame\r\n", 401),
        ("Authorization: Bearer open-sesame-12345\r\n", 401),
        ("Authorization: Basic open-sesame-1234\r\n", 401),
        ("Authorization: open-sesame-1234\r\n", 401),
        ("Authorization: Bearer open-sesame-1234\r\n", 200),
        ("authorization: bearer open-sesame-1234\r\n", 200),
    ] {
        let health = serving.ask("GET /health", given, b"");
        let scored = serving.ask("POST /score", given, body.as_bytes());
        assert_eq!((health.0, scored.0), (status, status), "{given:?}: {} {}", health.1, scored.1);
        let known = health.1.contains("jpeg-incompressibility") && score(&scored.1).is_some();
        assert_eq!(known, status == 200, "{given:?}: {} {}", health.1, scored.1);
    }
    for (text, mode, said) in [
        ("\n", 0o600, "holds no token"),
        ("x\n", 0o600, "has 1 characters"),
        ("open-sesame-1234\n", 0o644, "others may read or write it (mode 644); chmod 600 "),
    ] {
        secret(&file, text);
        std::fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
        let program = Command::new(env!("CARGO_BIN_EXE_flowrl-dist"));
        let output =
            { program }.args(["serve-reward", "--reward", "ocr", "--token-file", path(&file)]).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && error.contains(said), "{text:?} {mode:o}: {error}");
    }
}

/// Writes a file that only its owner may read.
fn secret(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_body_that_is_too_large_is_refused_and_the_next_one_answered() {
    let serving = Serving::start(&[]);
    let (status, said) = serving.ask("POST /score", "", &vec![b' '; (64 << 20) + 1]);
    assert_eq!(status, 413, "{said}");
    assert!(said.contains("send up to 64 MiB"), "{said}");
    let (status, said) = serving.ask("POST /score", "", asking().as_bytes());
    assert_eq!(status, 200, "{said}");
    assert!(score(&said).is_some(), "{said}");
}

/// Each of these would have had one of four places for a minute.
#[test]
fn bodies_that_do_not_come_hold_nobody_up() {
    let serving = Serving::start(&[]);
    let slow: Vec<TcpStream> = (0..8)
        .map(|_| {
            let mut stream = serving.connect();
            write!(stream, "POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n{{").unwrap();
            stream
        })
        .collect();
    let since = Instant::now();
    let (status, said) = serving.ask("POST /score", "", asking().as_bytes());
    assert!(status == 200 && score(&said).is_some(), "{said}");
    assert!(since.elapsed() < Duration::from_secs(4), "{:?}", since.elapsed());
    for mut stream in slow {
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert!(said.starts_with("HTTP/1.1 408") && said.contains("slower than 64 KiB a second"), "{said}");
    }
    assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
}

/// A request is under way, its body still on the way, when the signal comes: it is answered, no other is accepted, and the
/// program ends well.
#[test]
fn sigterm_ends_it_after_the_answer_under_way() {
    let mut serving = Serving::start(&[]);
    let body = asking();
    let mut stream = serving.connect();
    let length = body.len();
    write!(stream, "POST /score HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n")
        .unwrap();
    let mut answer = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    answer.read_line(&mut line).unwrap();
    assert_eq!(line.trim(), "HTTP/1.1 100 Continue", "the server waits for the body");
    answer.read_line(&mut line).unwrap();

    serving.terminate();
    let end = Instant::now() + PATIENCE;
    while TcpStream::connect(&serving.address).is_ok() {
        assert!(Instant::now() < end, "others are still accepted");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(serving.child.try_wait().unwrap(), None, "it waits for what is under way");

    stream.write_all(body.as_bytes()).unwrap();
    let mut said = String::new();
    answer.read_to_string(&mut said).unwrap(); // the server closes the connection
    assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    assert!(score(said.split_once("\r\n\r\n").unwrap().1).is_some(), "{said}");
    assert_eq!(serving.ends(), Some(0));
}

/// Clients that never finish what they began: half a head, a body that does not come, an answer that is not read. They hold
/// the server for as long as it gives requests under way, at most.
#[test]
fn sigterm_ends_it_whatever_clients_do() {
    let mut serving = Serving::start(&[]);
    let body = asking();
    let begun = |text: &str| {
        let mut stream = serving.connect();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    };
    let post = |length: usize, rest: &str| {
        format!("POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{rest}")
    };
    let silent = begun("");
    let half_a_head = begun("POST /score HTTP/1.1\r\nHost:");
    let half_a_body = begun(&post(body.len(), &body[..9]));
    let unread = begun(&post(body.len(), &body).repeat(50));
    assert_eq!(serving.ask("GET /health", "", b"").0, 200);
    serving.terminate();
    let since = Instant::now();
    assert_eq!(serving.ends(), Some(0));
    assert!(since.elapsed() < Duration::from_secs(25), "{:?}", since.elapsed());
    drop((silent, half_a_head, half_a_body, unread));
}

/// Nor do they hold a connection while nobody wants it to stop.
#[test]
fn a_head_that_does_not_come_closes_the_connection() {
    let serving = Serving::start(&[]);
    let since = Instant::now();
    let mut streams = [serving.connect(), serving.connect()];
    write!(streams[1], "GET /health HTTP/1.1\r\nHost:").unwrap();
    for mut stream in streams {
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
    assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
    assert_eq!(serving.ask("GET /health", "", b"").0, 200);
}

#[test]
fn what_cannot_be_served_is_refused_with_what_can() {
    for (arguments, said) in [
        (&[][..], "there is nothing to serve; name rewards with --reward, or give --config a file"),
        (&["--reward", "clip-score"], "--reward clip-score: needs more than its name; write it as [[reward]]"),
        (&["--reward", "foo"], "--reward foo: there is no such reward; choose from ocr, colour, jpeg-compressibility"),
    ] {
        let program = Command::new(env!("CARGO_BIN_EXE_flowrl-dist"));
        let output = { program }.args(["serve-reward", "--listen", "127.0.0.1:0"]).args(arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && error.contains(said), "{arguments:?}: {error}");
    }
}
