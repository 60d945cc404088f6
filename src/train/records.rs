//! What people look at: metrics and pictures, written by rank 0. A full disk does not end a run that can go on.

use crate::error::Result;
use crate::evaluate::Gallery;
use crate::fs;
use crate::observe::{Metrics, MetricsLog, grid, report};
use std::path::{Path, PathBuf};

/// Tiles in a row of a grid, and the width in pixels to which small pictures are enlarged.
const COLUMNS: usize = 6;
const WIDTH: usize = 144;

/// The records of a run in its folder; those of the other ranks take nothing.
pub(super) struct Records {
    out: PathBuf,
    log: Option<MetricsLog>,
    /// Whether the last record could not be written, which is told once.
    failing: bool,
}

impl Records {
    /// In the run folder `out`: after what was written until `resume_update`, or new ones; on rank 0, if this is the `first`.
    ///
    /// # Errors
    /// [`crate::Error::File`] where something else has the name of a folder of the run's, [`crate::Error::Io`].
    pub fn open(out: &Path, resume_update: Option<u64>, first: bool) -> Result<Self> {
        if first {
            ["samples", "checkpoints"].iter().try_for_each(|folder| fs::check_folder(&out.join(folder)))?;
        }
        let log = first.then(|| MetricsLog::open(out, resume_update)).transpose()?;
        Ok(Self { out: out.to_path_buf(), log, failing: false })
    }

    /// The metrics of an update.
    pub fn update(&mut self, update: u64, metrics: &Metrics) {
        if let Some(log) = &mut self.log {
            let written = log.write(update, metrics);
            self.tolerate(written);
        }
    }

    /// The metrics of an evaluation, a grid of its pictures, and the report anew.
    pub fn evaluation(&mut self, update: u64, metrics: &Metrics, gallery: &Gallery) -> Result<()> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let picture = grid::image_grid(&gallery.images, &gallery.captions, COLUMNS, enlarged(gallery)?)?;
        let line = log.write(update, metrics);
        let event = log.image(update, "samples", &picture);
        let file = grid::save_png(&picture, &self.out.join(format!("samples/update_{update:08}.png")));
        self.tolerate(line.and(event).and(file));
        if let Err(e) = report::write(&self.out) {
            tracing::warn!("{e}; the report is written again after the next evaluation");
        }
        Ok(())
    }

    /// Writes what could not be written before, as far as that is possible now.
    pub fn flush(&mut self) {
        let written = self.log.as_mut().map_or(Ok(()), MetricsLog::flush);
        self.tolerate(written);
    }

    /// The last picture, and the end of the log.
    ///
    /// # Errors
    /// [`crate::Error::Io`]: some metrics could not be written, and now there is no later chance.
    pub fn finish(&mut self, before: &Gallery, after: &Gallery, title: &str) -> Result<()> {
        let Some(mut log) = self.log.take() else { return Ok(()) };
        log.flush()?;
        let (columns, enlarged) = (COLUMNS / 2, enlarged(before)?);
        let picture = grid::before_after(&before.images, &after.images, &before.captions, title, columns, enlarged)?;
        self.tolerate(grid::save_png(&picture, &self.out.join("samples/before_after.png")));
        Ok(())
    }

    fn tolerate(&mut self, written: Result<()>) {
        if let Err(e) = &written
            && !self.failing
        {
            tracing::warn!("{e}; training goes on, and lines of metrics are written when that is possible again");
        }
        self.failing = written.is_err();
    }
}

/// How many times a grid's pictures are enlarged.
fn enlarged(gallery: &Gallery) -> Result<u32> {
    Ok((WIDTH / gallery.images.dim(3)?).max(1) as u32)
}
