//! Which files are meant by a path.

use crate::error::{Error, Result};
use crate::files;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// Names of a model's weights in a folder, of diffusers and of transformers: full precision before half, one file
/// before the index of shards.
const NAMES: [&str; 8] = [
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "model.safetensors.index.fp16.json",
];

/// Ends of the names of Python pickles.
const PICKLES: [&str; 4] = ["bin", "ckpt", "pt", "pth"];

/// The files of one model.
#[derive(Debug)]
pub(super) struct Found {
    /// The file, or the index.
    pub path: PathBuf,
    /// The files.
    pub files: Vec<PathBuf>,
    /// Which of the files holds a tensor, where an index says so.
    pub places: Option<HashMap<String, usize>>,
}

/// The files that `path` means: see [`super::Weights::open`].
pub(super) fn find(path: &Path) -> Result<Found> {
    if path.is_file() {
        return match extension(path) {
            e if PICKLES.contains(&e) => Err(pickle(path)),
            "json" => index(path),
            _ => Ok(Found { path: path.to_path_buf(), files: vec![path.to_path_buf()], places: None }),
        };
    }
    let error = |message: String| Error::File { path: path.to_path_buf(), message };
    if !path.is_dir() {
        return Err(error("there is nothing at this path; give a safetensors file or a folder with one".into()));
    }
    let mut incomplete = None;
    for name in NAMES.into_iter().filter(|name| path.join(name).is_file()) {
        match find(&path.join(name)) {
            Ok(found) => return Ok(found),
            Err(e) => incomplete = incomplete.or(Some(e)),
        }
    }
    if let Some(e) = incomplete {
        return Err(e);
    }
    let names = names(path)?;
    let of = |ends: &[&str]| names.iter().filter(|name| ends.contains(&extension(Path::new(name)))).collect::<Vec<_>>();
    match (of(&["safetensors"]).as_slice(), of(&PICKLES).as_slice()) {
        ([one], _) => find(&path.join(one)),
        ([], [pickled, ..]) => Err(pickle(&path.join(pickled))),
        ([], []) => Err(error(match snapshot(path) {
            Some(snapshot) => {
                format!(
                    "is a folder of the Hugging Face cache; give the one in it with the files: {}",
                    snapshot.display()
                )
            }
            None => "holds no safetensors file; give the folder of a model's weights".into(),
        })),
        (many, _) => {
            let count = many.len();
            Err(error(format!(
                "holds {count} safetensors files and no index that says how they belong together; name one"
            )))
        }
    }
}

/// The pickle that `path` means: the file itself, or the only one in a folder that holds no safetensors.
///
/// # Errors
/// The folder holds several, or cannot be read.
pub(super) fn pickle_of(path: &Path) -> Result<Option<PathBuf>> {
    if !path.is_dir() {
        return Ok(PICKLES.contains(&extension(path)).then(|| path.to_path_buf()));
    }
    let names = names(path)?;
    if names.iter().any(|name| extension(Path::new(name)) == "safetensors" || NAMES.contains(&name.as_str())) {
        return Ok(None);
    }
    let pickles: Vec<String> = names.into_iter().filter(|name| PICKLES.contains(&extension(Path::new(name)))).collect();
    match pickles.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(path.join(one))),
        many => {
            let message = format!("holds {} files of torch.save: {}; name one", many.len(), many.join(", "));
            Err(Error::File { path: path.to_path_buf(), message })
        }
    }
}

/// The folder with the files where `path` is a model's folder in the cache of Hugging Face, `models--owner--name`.
fn snapshot(path: &Path) -> Option<PathBuf> {
    let snapshots = path.join("snapshots");
    let main = std::fs::read_to_string(path.join("refs/main")).ok().map(|commit| snapshots.join(commit.trim()));
    let any = || Some(snapshots.join(names(&snapshots).ok()?.pop()?));
    main.filter(|main| main.is_dir()).or_else(any)
}

/// The shards that an index names.
fn index(path: &Path) -> Result<Found> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let error = |message: String| Error::File { path: path.to_path_buf(), message };
    let text = files::read_to_string(path)?;
    let Index { weight_map } = serde_json::from_str(&text)
        .map_err(|e| error(format!("is no index of safetensors shards ({e}); give the weights themselves")))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let names: Vec<&str> = weight_map.values().map(String::as_str).collect::<BTreeSet<_>>().into_iter().collect();
    if let Some(name) = names.iter().find(|name| Path::new(name).file_name().is_none_or(|file| file != **name)) {
        return Err(error(format!("names the shard {name:?}, which is not in its own folder; download it again")));
    }
    let absent: Vec<&str> = names.iter().copied().filter(|name| !folder.join(name).is_file()).collect();
    if !absent.is_empty() {
        let (count, all, list) = (absent.len(), names.len(), absent.join(", "));
        return Err(error(format!("{count} of the {all} shards it names are absent: {list}; download them as well")));
    }
    let number: HashMap<&str, usize> = names.iter().enumerate().map(|(i, name)| (*name, i)).collect();
    let places = weight_map.iter().map(|(name, file)| (name.clone(), number[file.as_str()])).collect();
    let files = names.iter().map(|name| folder.join(name)).collect();
    Ok(Found { path: path.to_path_buf(), files, places: Some(places) })
}

fn pickle(path: &Path) -> Error {
    let message = "is a Python pickle, which can run code when it is read, and is not read here; take the model's \
                   .safetensors files instead, or convert it in Python with safetensors.torch.save_file";
    Error::File { path: path.to_path_buf(), message: message.into() }
}

fn extension(path: &Path) -> &str {
    path.extension().and_then(|e| e.to_str()).unwrap_or_default()
}

/// The names in a folder, sorted.
pub(super) fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let names =
        entries.map(|entry| Ok(entry.map_err(Error::io(folder))?.file_name().into_string().unwrap_or_default()));
    let mut names = names.collect::<Result<Vec<_>>>()?;
    names.sort_unstable();
    Ok(names)
}
