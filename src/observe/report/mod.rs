//! One page about a run: what it reached, its curves, its samples, its configuration. And a comparison of several.
//!
//! Reads the run folders and nothing else. The page needs none of their files: what is missing or damaged is left out.

mod chart;
mod compare;
mod page;
mod run;

pub use compare::{Comparison, compare};
pub use run::Run;

use crate::error::{Error, Result};
use crate::fs;
use std::path::{Path, PathBuf};

/// The page's name in a run's folder.
pub const FILE: &str = "report.html";

/// Writes `run_dir/report.html` and returns its path. One self-contained file: inline SVG, embedded PNGs, no scripts.
///
/// Fails if `run_dir` is not a folder or the page cannot be written.
pub fn write(run_dir: &Path) -> Result<PathBuf> {
    if !run_dir.is_dir() {
        let message = "not a run folder; give the folder that a run wrote with --out".to_owned();
        return Err(Error::File { path: run_dir.to_path_buf(), message });
    }
    let path = run_dir.join(FILE);
    fs::write(&path, page::render(&run::Run::read(run_dir)))?;
    Ok(path)
}

/// Text for HTML and for attributes.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

/// A number for people: `12,288`, `0.412`, `3e-4`.
fn short(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() {
        return "–".into();
    }
    match size {
        0.0 => "0".into(),
        1e6.. => format!("{value:.2e}"),
        1e3.. => thousands(value),
        _ if size < 1e-3 => {
            let text = format!("{value:.1e}");
            text.replace(".0e", "e")
        }
        _ => {
            let text = format!("{value:.*}", if size < 10.0 { 3 } else { 1 });
            text.trim_end_matches('0').trim_end_matches('.').into()
        }
    }
}

/// A whole number with its thousands set apart.
fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let head = digits.len() % 3;
    let mut groups: Vec<&str> = if head > 0 { vec![&digits[..head]] } else { vec![] };
    groups.extend((head..digits.len()).step_by(3).map(|at| &digits[at..at + 3]));
    format!("{}{}", if value < 0.0 { "-" } else { "" }, groups.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let shown = [0.0, 12288.0, -1234567.0, 999.96, 0.4126, 0.5, 3e-4, 1.24e-5, f64::NAN].map(short);
        assert_eq!(shown, ["0", "12,288", "-1.23e6", "1000", "0.413", "0.5", "3e-4", "1.2e-5", "–"]);
        assert_eq!([5.0, 100.0, 1000.0, 1234567.0].map(thousands), ["5", "100", "1,000", "1,234,567"]);
    }

    #[test]
    fn escaping() {
        assert_eq!(escape(r#"<a href="x">'&'</a>"#), "&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;&lt;/a&gt;");
    }
}
