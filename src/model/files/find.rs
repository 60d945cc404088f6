//! Which files are meant by a path.

use crate::error::{Error, Result};
use crate::fs;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// Names of a model's weights in a folder, full precision and `fp16`, each in the order in which they count. Of diffusers'
/// names the index of shards goes before the single file (diffusers 0.42, models/modeling_utils.py), of transformers' the
/// single file (transformers 5.24, modeling_utils.py, `_get_resolved_checkpoint_files`).
const NAMES: [[&str; 4]; 2] = [
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
    ],
    [
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "model.fp16.safetensors",
        "model.safetensors.index.fp16.json",
    ],
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
    /// Weights of the same precision, or of another half, in the same folder that do not count: an index, a file, or a shard
    /// that no index names.
    pub beside: Vec<PathBuf>,
}

/// The files that `path` means: see [`super::Weights::open`].
pub(super) fn find(path: &Path) -> Result<Found> {
    if path.is_file() {
        return match extension(path) {
            e if PICKLES.contains(&e) => Err(pickle(path)),
            "json" => index(path),
            _ => Ok(Found {
                path: path.to_path_buf(),
                files: vec![path.to_path_buf()],
                places: None,
                beside: Vec::new(),
            }),
        };
    }
    let error = |message: String| Error::File { path: path.to_path_buf(), message };
    if !path.is_dir() {
        return Err(error("there is nothing at this path; give a safetensors file or a folder with one".into()));
    }
    if let Some(found) = by_name(path)? {
        return Ok(found);
    }
    let names = names(path)?;
    if let Some(adapter) = adapter_inside(path, &names) {
        let adapter = adapter.display();
        return Err(error(format!(
            "has its adapter in a folder of its own, as the checkpoints of DiffusionNFT and Flow-GRPO do; give {adapter}"
        )));
    }
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

/// The weights of a folder by their libraries' names; none where there are no such names. An index none of whose shards is
/// there is passed over for weights that are: indices come with every download, shards with that of their precision.
///
/// # Errors
/// Some of the shards are there and some are not, or all are absent and there is nothing else.
fn by_name(folder: &Path) -> Result<Option<Found>> {
    let there: Vec<Vec<PathBuf>> = NAMES
        .iter()
        .map(|names| names.iter().map(|name| folder.join(name)).filter(|path| fs::is_named(path)).collect())
        .collect();
    let mut empty = None;
    for (variant, paths) in there.iter().enumerate() {
        for (number, path) in paths.iter().enumerate() {
            match find(path) {
                Ok(found) => {
                    let mut beside = paths[number + 1..].to_vec();
                    beside.extend(unnamed(folder, paths)?);
                    if variant > 0 {
                        beside.extend(of_other_halves(folder)?);
                    }
                    return Ok(Some(Found { beside, ..found }));
                }
                Err(e)
                    if extension(path) == "json"
                        && shards(path).is_ok_and(|shards| !shards.iter().any(|shard| shard.is_file())) =>
                {
                    empty = empty.or(Some(e));
                }
                Err(Error::File { path, message }) => {
                    let other = paths[number + 1..].iter().chain(there[variant + 1..].iter().flatten()).next();
                    let remedy = other.map(|other| format!(", or move it away to have {} read", other.display()));
                    let message = format!("{message}{}", remedy.unwrap_or_default());
                    return Err(Error::File { path, message });
                }
                Err(e) => return Err(e),
            }
        }
    }
    empty.map_or(Ok(None), Err)
}

/// Weights in a folder of another half precision than that whose names are known, `fp16`: `model.bf16.safetensors`.
fn of_other_halves(folder: &Path) -> Result<Vec<PathBuf>> {
    let names = names(folder)?.into_iter().filter(|name| name.ends_with(".bf16.safetensors"));
    Ok(names.map(|name| folder.join(name)).collect())
}

/// Files in a folder that are called like shards of the weights at `paths`, of one precision, and that no index among these
/// names: `model-00003-of-00003.safetensors`.
fn unnamed(folder: &Path, paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut named = BTreeSet::new();
    let mut stems = BTreeSet::new();
    for path in paths {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let variant = if name.contains(".fp16.") { ".fp16" } else { "" };
        stems.insert(format!("{}{variant}-", name.split('.').next().unwrap_or_default()));
        if extension(path) == "json" {
            named.extend(shards(path)?);
        }
    }
    let is_shard = |name: &String| name.ends_with(".safetensors") && stems.iter().any(|stem| name.starts_with(stem));
    let shards = names(folder)?.into_iter().filter(is_shard).map(|name| folder.join(name));
    Ok(shards.filter(|path| !named.contains(path)).collect())
}

/// File names in an adapter's folder: of PEFT, of diffusers.
pub(super) const ADAPTERS: [&str; 2] = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"];

/// The folder of an adapter inside one of the folders in `folder`.
fn adapter_inside(folder: &Path, names: &[String]) -> Option<PathBuf> {
    let holds = |inside: &PathBuf| ADAPTERS.iter().any(|file| inside.join(file).is_file());
    names.iter().map(|name| folder.join(name)).find(holds)
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
    let is_safetensors =
        |name: &String| extension(Path::new(name)) == "safetensors" || NAMES.as_flattened().contains(&name.as_str());
    if names.iter().any(is_safetensors) {
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

/// Which shard holds a tensor, by an index.
fn weight_map(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let error = |message: String| Error::File { path: path.to_path_buf(), message };
    let text = fs::read_to_string(path)?;
    let Index { weight_map } = serde_json::from_str(&text)
        .map_err(|e| error(format!("is no index of safetensors shards ({e}); give the weights themselves")))?;
    let outside = |name: &&String| Path::new(name).file_name().is_none_or(|file| file != name.as_str());
    match weight_map.values().find(outside) {
        Some(name) => {
            Err(error(format!("names the shard {name:?}, which is not in its own folder; download it again")))
        }
        None => Ok(weight_map),
    }
}

/// The shards that an index names, there or not.
fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let names: BTreeSet<String> = weight_map(index)?.into_values().collect();
    Ok(names.into_iter().map(|name| index.with_file_name(name)).collect())
}

/// The model whose shards an index names.
fn index(path: &Path) -> Result<Found> {
    let map = weight_map(path)?;
    let files = shards(path)?;
    let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let absent: Vec<String> = files.iter().filter(|file| !file.is_file()).map(name).collect();
    if !absent.is_empty() {
        let (count, all, list) = (absent.len(), files.len(), absent.join(", "));
        let message = format!("{count} of the {all} shards it names are absent: {list}; download them as well");
        return Err(Error::File { path: path.to_path_buf(), message });
    }
    let number: HashMap<String, usize> = files.iter().map(name).zip(0..).collect();
    let places = map.into_iter().map(|(tensor, file)| (tensor, number[&file])).collect();
    Ok(Found { path: path.to_path_buf(), files, places: Some(places), beside: Vec::new() })
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
