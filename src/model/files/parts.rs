//! The parts of what lies at a path.

use super::folder::Part;
use super::{Adapter, Format, Weights, pipeline, sai};
use crate::error::Result;
use std::path::Path;

/// The parts of what lies at `path`, those of a pipeline that are missing too. Parts that `model_index.json` sets to
/// null are not missing.
///
/// # Errors
/// As [`Format::of`].
pub fn parts(path: &Path) -> Result<(Format, Vec<Part>)> {
    let format = Format::of(path)?;
    let whole = |name: &str, weights: Weights| Part { name: name.into(), weights: Some(weights), problem: None };
    let parts = match format {
        Format::Pipeline => pipeline::parts(path)?,
        Format::Transformer | Format::Embedded(_) => vec![whole("transformer", Weights::open(path)?)],
        Format::SingleFile => {
            let weights = Weights::open(path)?;
            let of = [("transformer", sai::transformer(&weights)?), ("vae", sai::vae(&weights)?)];
            of.into_iter().filter_map(|(name, weights)| Some(whole(name, weights?))).collect()
        }
        _ => vec![whole("adapter", Adapter::open(path)?.weights)],
    };
    Ok((format, parts))
}
