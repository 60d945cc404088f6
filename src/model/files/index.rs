//! `model_index.json`: which parts a pipeline of diffusers has.

use crate::error::{Error, Result};
use crate::fs;
use serde_json::{Map, Value};
use std::path::Path;

/// File of a pipeline that names its parts.
pub(super) const INDEX: &str = "model_index.json";

/// What the classes of pipelines begin with that are put together of the parts that are read here.
const CLASS: &str = "StableDiffusion3";

/// The parts that a pipeline's list names, `[library, class]` each.
#[derive(Debug)]
pub struct Index(Map<String, Value>);

impl Index {
    /// The list of the pipeline in `folder`; none where there is no such file.
    ///
    /// # Errors
    /// [`Error::File`]: it cannot be read, or is of another class of pipelines.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(INDEX);
        if !fs::is_named(&path) {
            return Ok(None);
        }
        let text = fs::read_to_string(&path)?;
        let error = |message: String| Error::File { path: path.clone(), message };
        let entries: Map<String, Value> = serde_json::from_str(&text)
            .map_err(|e| error(format!("is no index of a pipeline ({e}); download it again")))?;
        match entries.get("_class_name") {
            Some(class) if !class.as_str().is_some_and(|class| class.starts_with(CLASS)) => Err(error(format!(
                "has _class_name = {class}, not {CLASS}Pipeline; give a folder of Stable Diffusion 3.5"
            ))),
            _ => Ok(Some(Self(entries))),
        }
    }

    /// Whether it names a class for a part. A pipeline does without a part that its list sets to null or leaves out, whether
    /// or not there is a folder of that name, as in diffusers.
    pub fn names(&self, part: &str) -> bool {
        self.0.get(part).and_then(|entry| entry.get(0)).is_some_and(|library| !library.is_null())
    }
}

/// Whether the pipeline in `folder` has T5: where there is a list, it says so, else the folder of that name. Without it zeros
/// stand for its part, as in diffusers.
///
/// # Errors
/// The list names one that is not there, a download that is not complete; or it cannot be read.
pub fn has_t5(folder: &Path) -> Result<bool> {
    const T5: &str = "text_encoder_3";
    let is_there = folder.join(T5).is_dir();
    match Index::read(folder)? {
        None => Ok(is_there),
        Some(index) if index.names(T5) && !is_there => Err(Error::File {
            path: folder.join(INDEX),
            message: format!(
                "names {T5}, which is not in the folder; download it, or write \"{T5}\": [null, null] there to do \
                 without T5"
            ),
        }),
        Some(index) => Ok(index.names(T5)),
    }
}
