//! Messages: warnings and notices of rank 0 on the terminal, everything of every rank in a file of its own.

use crate::error::{Error, Result};
use crate::fs::{Appended, check_folder};
use crate::plain;
use indicatif::{MultiProgress, ProgressDrawTarget};
use std::fmt;
use std::fs;
use std::io::{self, IsTerminal, Write as _};
use std::path::Path;
use std::sync::Mutex;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt as layer};

/// The person's end of stderr: lines and a progress bar that do not write over each other.
#[derive(Debug, Clone)]
pub struct Terminal {
    bars: MultiProgress,
    interactive: bool,
}

impl Default for Terminal {
    /// Interactive if stderr is a terminal that can move its cursor.
    fn default() -> Self {
        let dumb = std::env::var("TERM").is_ok_and(|term| term == "dumb");
        let interactive = io::stderr().is_terminal() && !dumb;
        let target = if interactive { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self { bars: MultiProgress::with_draw_target(target), interactive }
    }
}

impl Terminal {
    /// Whether a bar may be drawn; otherwise stderr is a pipe or a file and gets plain lines without control characters.
    pub fn is_interactive(&self) -> bool {
        self.interactive
    }

    /// Writes one line above the bar, if there is one.
    pub fn line(&self, text: &str) {
        self.write(format!("{}\n", plain::line(text)).as_bytes());
    }

    pub(super) fn bars(&self) -> &MultiProgress {
        &self.bars
    }

    fn write(&self, bytes: &[u8]) {
        // A closed stderr must not end a training run.
        self.bars.suspend(|| io::stderr().write_all(bytes).ok());
    }
}

/// Tells a person something in one line, where no bar is drawn. A terminal that is closed meanwhile ends nothing.
pub fn say(line: &str) {
    writeln!(io::stderr(), "flowrl-dist: {}", plain::line(line)).ok();
}

/// Sends `tracing` to the terminal (rank 0) and to `out_dir/logs/rank_00000.log` (every rank, appended).
///
/// `level` is a level (`info`) or a list of `tracing` directives (`warn,flowrl_dist=debug`); the environment variable
/// `RUST_LOG` goes before it. The returned [`Terminal`] is for [`super::Progress`]. A second call in one process leaves
/// the first in force.
pub fn init(rank: usize, out_dir: Option<&Path>, level: &str) -> Result<Terminal> {
    let directives = std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_else(|_| level.to_owned());
    let filter = EnvFilter::builder()
        .parse(&directives)
        .map_err(|e| Error::Usage(format!("log level \"{directives}\": {e}; use error, warn, info, debug or trace")))?;

    let terminal = Terminal::default();
    let to_terminal = (rank == 0).then(|| {
        layer::layer()
            .with_ansi(terminal.interactive)
            .event_format(ForPeople)
            .with_writer(terminal.clone())
            .with_filter(tracing::level_filters::LevelFilter::INFO)
    });
    let to_file = match out_dir {
        None => None,
        Some(out_dir) => {
            let folder = out_dir.join("logs");
            check_folder(&folder)?;
            fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
            let path = folder.join(format!("rank_{rank:05}.log"));
            let file = Mutex::new(Appended::open(out_dir, path)?);
            Some(layer::layer().with_ansi(false).event_format(ForFile { rank }).with_writer(file))
        }
    };
    let harmless = filter_fn(|message| !shows_requests(message.target(), *message.level()));
    tracing_subscriber::registry().with(filter).with(harmless).with(to_terminal).with(to_file).try_init().ok();
    Ok(terminal)
}

/// Whether messages of a library may hold what is sent to a server of rewards, the token among it: the HTTP client's dump of
/// every byte. No level shows them.
fn shows_requests(target: &str, level: Level) -> bool {
    level == Level::TRACE && target.starts_with("ureq")
}

impl<'a> MakeWriter<'a> for Terminal {
    type Writer = TerminalWriter<'a>;

    fn make_writer(&'a self) -> TerminalWriter<'a> {
        TerminalWriter(self)
    }
}

/// Hands one message to the terminal at a time.
#[derive(Debug)]
pub struct TerminalWriter<'a>(&'a Terminal);

impl io::Write for TerminalWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `warning: message`, a notice without any prefix.
struct ForPeople;

impl<S, N> FormatEvent<S, N> for ForPeople
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let (prefix, colour) = match *event.metadata().level() {
            Level::ERROR => ("error: ", "\x1b[1;31m"),
            Level::WARN => ("warning: ", "\x1b[1;33m"),
            _ => ("", ""),
        };
        if out.has_ansi_escapes() && !prefix.is_empty() {
            write!(out, "{colour}{prefix}\x1b[0m")?;
        } else {
            out.write_str(prefix)?;
        }
        writeln!(out, "{}", fields(context, event)?)
    }
}

/// The message and the fields of an event, one line without control characters.
fn fields<S, N>(context: &FmtContext<'_, S, N>, event: &Event<'_>) -> std::result::Result<String, fmt::Error>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    let mut text = String::new();
    context.format_fields(Writer::new(&mut text), event)?;
    Ok(plain::line(&text).into_owned())
}

/// `2026-01-31T12:00:00.000000Z rank 3 INFO flowrl_dist::train: phase: message`.
struct ForFile {
    rank: usize,
}

impl<S, N> FormatEvent<S, N> for ForFile
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        SystemTime.format_time(&mut out)?;
        write!(out, " rank {} {} {}: ", self.rank, event.metadata().level(), event.metadata().target())?;
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            write!(out, "{}: ", span.name())?;
        }
        writeln!(out, "{}", fields(context, event)?)
    }
}
