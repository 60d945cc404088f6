//! Named numbers of one update or evaluation, joined over micro-batches and ranks, and the files they go to.

use super::tensorboard::EventWriter;
use crate::comm::{Communicator, exchange};
use crate::error::{Error, Result};
use crate::fs::Appended;
use image::RgbImage;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::Path;

/// How the contributions to one name are joined.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
enum Entry {
    /// Weighted mean: the sum of weight * value, and the sum of the weights.
    Mean(f64, f64),
    /// One value, the same on every rank.
    Set(f64),
    /// Sum.
    Sum(f64),
    /// Largest.
    Max(f64),
}

impl Entry {
    fn value(self) -> f64 {
        match self {
            Entry::Mean(sum, weight) => sum / weight,
            Entry::Set(value) | Entry::Sum(value) | Entry::Max(value) => value,
        }
    }

    /// Joins an earlier contribution with a later one; `None` if they are of different kinds.
    fn join(self, later: Entry) -> Option<Entry> {
        Some(match (self, later) {
            (Entry::Mean(sum, weight), Entry::Mean(s, w)) => Entry::Mean(sum + s, weight + w),
            (Entry::Set(_), Entry::Set(value)) => Entry::Set(value),
            (Entry::Sum(sum), Entry::Sum(s)) => Entry::Sum(sum + s),
            // Not f64::max: a NaN must stay visible.
            (Entry::Max(a), Entry::Max(b)) => Entry::Max(if a > b || a.is_nan() { a } else { b }),
            _ => return None,
        })
    }
}

/// Names and values in the order in which the names first appeared.
///
/// A name is of one kind (mean, value, sum, largest) for its life. Means carry their weights, so that micro-batches and
/// ranks of unequal size count by their samples.
///
/// ```
/// use flowrl_dist::observe::Metrics;
/// let mut metrics = Metrics::default();
/// metrics.add_mean("loss", 1.0, 3.0);
/// metrics.add_mean("loss", 5.0, 1.0);
/// assert_eq!(metrics.get("loss"), Some(2.0));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    entries: Vec<(String, Entry)>,
}

impl Metrics {
    /// Adds to a weighted mean. A contribution of weight zero only makes the name known.
    pub fn add_mean(&mut self, name: &str, value: f64, weight: f64) {
        // An empty micro-batch has no mean: 0 * NaN must not spoil the others.
        let sum = if weight == 0.0 { 0.0 } else { value * weight };
        self.push(name, Entry::Mean(sum, weight));
    }

    /// Sets a value that is the same on every rank (the learning rate, the norm of the reduced gradient).
    pub fn set(&mut self, name: &str, value: f64) {
        self.push(name, Entry::Set(value));
    }

    /// Adds to a sum over calls and ranks (a number of images).
    pub fn add(&mut self, name: &str, value: f64) {
        self.push(name, Entry::Sum(value));
    }

    /// Keeps the largest over calls and ranks (a phase's time: the slowest rank's). A NaN stays.
    pub fn max(&mut self, name: &str, value: f64) {
        self.push(name, Entry::Max(value));
    }

    /// The value of a name; a mean without any weight is NaN.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// Names and values in the order of first appearance.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry.value()))
    }

    /// Whether there is no name.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The first of the rewards' means, `reward.NAME.mean` or `eval.reward.NAME.mean`, with its name. In training that is the
    /// run's first reward; in an evaluation a reward that scored nothing is not among them.
    pub fn reward(&self) -> Option<(&str, f64)> {
        self.iter().find(|(name, _)| {
            name.strip_prefix("eval.").unwrap_or(name).starts_with("reward.") && name.ends_with(".mean")
        })
    }

    /// Joins the metrics of all ranks, in rank order; afterwards every rank holds the same. Collective, once per object:
    /// a second call would count every rank R times.
    ///
    /// Of values given with [`Metrics::set`] rank 0's stays. Fails if two ranks give a name different kinds.
    pub fn reduce(&mut self, comm: &dyn Communicator) -> Result<()> {
        *self = join_ranks(exchange(comm, self)?)?;
        Ok(())
    }

    fn push(&mut self, name: &str, entry: Entry) {
        match self.entries.iter_mut().find(|(known, _)| known == name) {
            None => self.entries.push((name.to_owned(), entry)),
            Some((_, known)) => {
                debug_assert!(known.join(entry).is_some(), "metric {name} is used with two kinds");
                *known = known.join(entry).unwrap_or(entry);
            }
        }
    }
}

/// The metrics of all ranks as one, joined in rank order.
fn join_ranks(ranks: Vec<Metrics>) -> Result<Metrics> {
    let mut all = Metrics::default();
    for (name, entry) in ranks.into_iter().flat_map(|metrics| metrics.entries) {
        match all.entries.iter_mut().find(|(known, _)| *known == name) {
            None => all.entries.push((name, entry)),
            Some((_, Entry::Set(_))) if matches!(entry, Entry::Set(_)) => {}
            Some((_, known)) => {
                *known = known
                    .join(entry)
                    .ok_or_else(|| Error::Failed(format!("metric {name} is of different kinds on different ranks")))?;
            }
        }
    }
    Ok(all)
}

/// `OUT/metrics.jsonl` and the TensorBoard event file beside it. Opened on rank 0 only.
#[derive(Debug)]
pub struct MetricsLog {
    lines: Appended,
    /// Lines, or what is left of one, that could not be written yet.
    unwritten: Vec<u8>,
    events: EventWriter,
}

impl MetricsLog {
    /// Opens both files in `out_dir`, which is made if absent.
    ///
    /// With `resume_update` lines of later updates, and a last line torn by a crash, are cut and the rest goes on.
    /// Without, a new run begins: the metrics and event files of an earlier run in this folder are replaced. Sample grids
    /// (`samples/update_N.png`) of updates that are still to come are deleted, and `samples/before_after.png`.
    pub fn open(out_dir: &Path, resume_update: Option<u64>) -> Result<Self> {
        fs::create_dir_all(out_dir).map_err(Error::io(out_dir))?;
        let path = out_dir.join("metrics.jsonl");
        remove_samples_after(&out_dir.join("samples"), resume_update)?;
        match resume_update {
            Some(update) => cut_after(&path, update)?,
            None => {
                crate::fs::write(&path, "")?;
                EventWriter::remove_all(out_dir)?;
            }
        }
        let lines = Appended::open(out_dir, path)?;
        let events = EventWriter::create(out_dir, resume_update.map(|update| update + 1))?;
        Ok(Self { lines, unwritten: Vec::new(), events })
    }

    /// Writes one line `{"update": .., name: value, ..}` and the scalars; both are with the system when this returns.
    /// A value that is not finite is written as null.
    ///
    /// # Errors
    /// [`Error::Io`]: a line that could not be written is kept, and written with the next one; scalars are lost.
    pub fn write(&mut self, update: u64, metrics: &Metrics) -> Result<()> {
        let mut object = serde_json::Map::new();
        object.insert("update".into(), update.into());
        for (name, value) in metrics.iter().filter(|(name, _)| *name != "update") {
            object.insert(name.into(), number(value));
        }
        let line = format!("{}\n", serde_json::Value::Object(object));
        self.unwritten.extend(line.as_bytes());
        let scalars = metrics.iter().filter(|(name, _)| !matches!(*name, "update" | "iteration"));
        let scalars = self.events.scalars(update, scalars);
        self.flush().and(scalars)
    }

    /// Writes the lines that could not be written before.
    ///
    /// # Errors
    /// [`Error::Io`]: they are kept.
    pub fn flush(&mut self) -> Result<()> {
        let path = self.lines.path().to_path_buf();
        let file = self.lines.file()?;
        while !self.unwritten.is_empty() {
            match file.write(&self.unwritten) {
                Ok(0) => return Err(Error::io(&path)(ErrorKind::WriteZero.into())),
                Ok(written) => drop(self.unwritten.drain(..written)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(&path)(e)),
            }
        }
        Ok(())
    }

    /// Writes a picture (a grid of samples) to the event file under `tag`.
    pub fn image(&mut self, update: u64, tag: &str, picture: &RgbImage) -> Result<()> {
        self.events.image(update, tag, picture)
    }
}

/// A JSON number; counts without a fraction, null if not finite.
fn number(value: f64) -> serde_json::Value {
    const EXACT: f64 = (1_u64 << 53) as f64;
    if value.fract() == 0.0 && value.abs() < EXACT { (value as i64).into() } else { value.into() }
}

/// Drops the lines of `path` with an update later than `update`, and every line that is not whole.
fn cut_after(path: &Path, update: u64) -> Result<()> {
    let text = match crate::fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let keep = |line: &&str| {
        let object: Option<serde_json::Value> = serde_json::from_str(line).ok();
        line.ends_with('\n') && object.and_then(|o| o.get("update")?.as_u64()).is_some_and(|u| u <= update)
    };
    let kept: String = text.split_inclusive('\n').filter(keep).collect();
    if kept != text {
        crate::fs::write(path, kept)?;
    }
    Ok(())
}

/// Deletes the sample grids of updates later than `update`, of all without one, and what compares with the last one.
fn remove_samples_after(folder: &Path, update: Option<u64>) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::io(folder))?,
    };
    for entry in entries {
        let path = entry.map_err(Error::io(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let digits = name.strip_prefix("update_").and_then(|rest| rest.strip_suffix(".png"));
        let of: Option<u64> = digits.and_then(|digits| digits.parse().ok());
        let is_later = of.is_some_and(|of| update.is_none_or(|last| of > last));
        if is_later || name == "before_after.png" {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn lines_that_cannot_be_written_are_written_later() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(folder.path(), None).unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        for update in 1..3 {
            log.write(update, &Metrics::default()).unwrap_err();
        }
        log.flush().unwrap_err();
        fs::remove_file(&path).unwrap();
        log.write(3, &Metrics::default()).unwrap();
        let text = fs::read_to_string(path).unwrap();
        assert_eq!(text, "{\"update\":1}\n{\"update\":2}\n{\"update\":3}\n");
    }

    #[test]
    fn ranks_join_in_rank_order() {
        let (mut a, mut b) = (Metrics::default(), Metrics::default());
        a.add_mean("loss", 1.0, 3.0);
        a.set("lr", 0.5);
        a.add("images", 3.0);
        b.add("images", 1.0);
        b.set("lr", 0.25);
        b.max("time.train", 2.0);
        b.add_mean("loss", 5.0, 1.0);
        let all = join_ranks(vec![a.clone(), b]).unwrap();
        let expected = [("loss", 2.0), ("lr", 0.5), ("images", 4.0), ("time.train", 2.0)];
        assert_eq!(all.iter().collect::<Vec<_>>(), expected);

        let mut c = Metrics::default();
        c.set("images", 1.0);
        let error = join_ranks(vec![a, c]).unwrap_err().to_string();
        assert_eq!(error, "metric images is of different kinds on different ranks");
    }
}
