//! A pipeline of diffusers, part by part.

use super::folder::Part;
use super::index::{INDEX, Index};
use super::{SCHEDULER, Transformer, Weights, read_shift};
use crate::error::Result;
use crate::model::text::{T5Encoder, Tokenizer};
use crate::model::vae::{self, Vae};
use crate::model::{clip, mmdit};
use std::path::Path;

/// The parts of a Stable Diffusion 3 pipeline.
const PARTS: [&str; 9] = [
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "scheduler",
];

/// The parts of a pipeline's folder, each looked at as its loader does, without reading tensors, and all against the
/// transformer.
pub(super) fn parts(folder: &Path) -> Result<Vec<Part>> {
    let index = Index::read(folder)?;
    let is_wanted = |name: &str| index.as_ref().is_none_or(|index| index.names(name) || is_read(folder, name));
    let mut parts: Vec<Part> =
        PARTS.into_iter().filter(|name| is_wanted(name)).map(|name| part(&folder.join(name), name)).collect();
    if let Some(transformer) = parts.iter().find(|part| part.name == "transformer" && part.problem.is_none()) {
        let config = Transformer::open(&folder.join(&transformer.name))?.config;
        for (name, misfit) in misfits(folder, &config) {
            for part in parts.iter_mut().filter(|part| part.name == name && part.problem.is_none()) {
                part.problem = Some(misfit.clone());
            }
        }
    }
    if index.is_none() {
        parts.push(Part { name: INDEX.into(), weights: None, problem: Some("is absent".into()) });
    }
    Ok(parts)
}

/// Whether loading reads a part that the index does not name: each whose folder is there but T5, without which a model does.
fn is_read(folder: &Path, name: &str) -> bool {
    folder.join(name).is_dir() && !name.ends_with("_3")
}

/// Tokens that a tokenizer is tried with.
const TOKENS: usize = 77;

fn part(folder: &Path, name: &str) -> Part {
    let (weights, state) = match name {
        _ if !folder.is_dir() => (None, Err("is absent".to_owned())),
        "transformer" => weighed(folder, Transformer::open(folder).map(drop)),
        "vae" => weighed(folder, Vae::check_files(folder)),
        "text_encoder_3" => weighed(folder, T5Encoder::check_files(folder)),
        "scheduler" => (None, read_shift(&folder.join(SCHEDULER)).map(drop).map_err(|e| e.to_string())),
        tokenizer if tokenizer.starts_with("tokenizer") => (None, check_tokenizer(folder).map_err(|e| e.to_string())),
        _ => weighed(folder, clip::TextEncoder::check_files(folder)),
    };
    Part { name: name.to_owned(), weights, problem: state.err() }
}

/// Refuses a tokenizer that cannot be read, or makes tokens that the encoder beside it does not know.
fn check_tokenizer(folder: &Path) -> Result<()> {
    let tokenizer = Tokenizer::open(folder, TOKENS)?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy().replace("tokenizer", "text_encoder");
    let encoder = folder.with_file_name(&name);
    let vocabulary = match name.as_str() {
        "text_encoder_3" => T5Encoder::vocabulary(&encoder),
        _ => clip::TextConfig::read(&encoder).map(|config| config.vocab_size),
    };
    // What is wrong with the encoder is told of the encoder.
    vocabulary.map_or(Ok(()), |vocabulary| tokenizer.check(vocabulary))
}

/// The weights of a part, which are shown even where its loader refuses them.
fn weighed(folder: &Path, checked: Result<()>) -> (Option<Weights>, std::result::Result<(), String>) {
    (Weights::open(folder).ok(), checked.map_err(|e| e.to_string()))
}

/// What does not fit a transformer among the other parts in `folder`, as far as their configurations can be read: the
/// part's name, and how.
pub fn misfits(folder: &Path, transformer: &mmdit::Config) -> Vec<(&'static str, String)> {
    let mut misfits = Vec::new();
    let (channels, width, pooled) =
        (transformer.in_channels, transformer.joint_attention_dim, transformer.pooled_projection_dim);
    let vae = vae::Config::read(&folder.join("vae/config.json")).map(|vae| vae.latent_channels);
    if let Some(made) = vae.ok().filter(|made| *made != channels) {
        misfits.push(("vae", format!("makes latents of {made} channels, the transformer wants {channels}")));
    }
    let t5 = T5Encoder::width(&folder.join("text_encoder_3"));
    if let Some(made) = t5.ok().filter(|made| *made != width) {
        misfits.push(("text_encoder_3", format!("makes states {made} wide, the transformer wants {width}")));
    }
    let clip = ["text_encoder", "text_encoder_2"].map(|name| clip::TextConfig::read(&folder.join(name)));
    if let [Ok(l), Ok(g)] = clip {
        let (states, features) = (l.hidden_size + g.hidden_size, l.projection_dim + g.projection_dim);
        if states > width {
            let message =
                format!("makes states {states} wide together with text_encoder, the transformer wants {width}");
            misfits.push(("text_encoder_2", message));
        } else if features != pooled {
            let message =
                format!("makes {features} features together with text_encoder, the transformer wants {pooled}");
            misfits.push(("text_encoder_2", message));
        }
    }
    misfits
}
