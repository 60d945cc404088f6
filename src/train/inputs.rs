//! What the ranks have read: files whose names are the same everywhere need not hold the same where a node has copies of its
//! own, or where one was changed between two lives of a run.

use super::stages::Stages;
use crate::comm::{World, exchange};
use crate::config::file_name;
use crate::data::PromptSet;
use crate::digest;
use crate::error::{Error, Result};
use crate::model::files::Adapter;
use crate::pipeline::ModelConfig;
use std::collections::BTreeMap;
use std::path::Path;

/// Digests by what was read, as a message names it: `data.train = "prompts.txt"`, wherever that file lies.
pub(super) type Digests = BTreeMap<String, String>;

/// The digests of all prompts that a run trains and evaluates on.
///
/// # Errors
/// Metadata that cannot be written as JSON, which what was read from JSON can.
pub(super) fn prompts(stages: &Stages, evaluated: (&str, &PromptSet)) -> Result<Digests> {
    let trained = stages.sources().map(|(stage, set)| (stage.source(), set));
    let evaluated = (named("data.eval", evaluated.0), evaluated.1);
    trained.chain([evaluated]).map(|(name, set)| Ok((name, digest(set)?))).collect()
}

/// The digests of the base model, of the parts around it, and of the adapter that is trained on, if any.
///
/// # Errors
/// [`Error::File`]: the adapter cannot be read.
pub(super) fn weights(model: &ModelConfig, base_digest: &str, parts: &Digests) -> Result<Digests> {
    let mut all = Digests::from([("the base model".into(), base_digest.to_owned())]);
    all.extend(parts.iter().map(|(name, digest)| (format!("{name} in model.path"), digest.clone())));
    if let Some(path) = &model.lora.path {
        all.insert(named("model.lora.path", path), Adapter::open(path)?.weights.digest());
    }
    Ok(all)
}

fn named(key: &str, path: impl AsRef<Path>) -> String {
    format!("{key} = {:?}", file_name(path.as_ref()))
}

/// Digest of a set's texts and metadata, in their order.
fn digest(set: &PromptSet) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for prompt in &set.prompts {
        let words = serde_json::to_string(&(&*prompt.text, prompt.metadata.as_deref()));
        let words = words.map_err(|e| Error::Failed(format!("prompt {:?} cannot be written: {e}", prompt.text)))?;
        hasher.update(words.as_bytes()).update(b"\n");
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Whether every rank has read the same; collective, the same answer on every rank.
///
/// # Errors
/// [`Error::Usage`] that names the first rank and its host whose digest is another, and of what.
pub(super) fn agree(read: &Digests, world: &World) -> Result<()> {
    let all = exchange(&*world.host, &(world.hostname().to_owned(), read.clone()))?;
    let (first_host, first) = &all[0];
    for (rank, (host, read)) in all.iter().enumerate() {
        if let Some((name, digest)) = first.iter().find(|(name, digest)| read.get(*name) != Some(*digest)) {
            return Err(Error::Usage(format!(
                "{name}: rank {rank} on {host} reads something else there than rank 0 on {first_host} (digest {}, not {}): \
                 give all hosts the same files, or a folder that they share",
                read.get(name).map_or("none", |digest| digest::short(digest)),
                digest::short(digest)
            )));
        }
    }
    Ok(())
}

/// The prompt sets that held something else when a checkpoint was `saved`, under the same name.
pub(super) fn changed<'a>(read: &'a Digests, saved: &Digests) -> Vec<&'a str> {
    let changed = |name: &String, digest: &String| saved.get(name).is_some_and(|saved| saved != digest);
    read.iter().filter(|(name, digest)| changed(name, digest)).map(|(name, _)| name.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::ThreadGroup;
    use crate::data::Format;

    #[test]
    fn what_differs_names_the_rank_and_the_file() {
        let read =
            |base: &str| Digests::from([("data.train = \"a.txt\"".into(), "1".into()), ("model".into(), base.into())]);
        ThreadGroup::run(3, |world| agree(&read("2"), &world)).unwrap();
        let error = ThreadGroup::run(3, |world| agree(&read(if world.rank() == 2 { "3" } else { "2" }), &world));
        let Err(Error::Usage(line)) = error else { panic!("{error:?}") };
        assert!(line.starts_with("model: rank 2 on ") && line.contains("(digest 3, not 2)"), "{line}");
    }

    #[test]
    fn a_digest_is_of_texts_metadata_and_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let of = |text: &str| {
            let file = folder.path().join("prompts.jsonl");
            std::fs::write(&file, text).unwrap();
            digest(&PromptSet::from_file(&file, Format::Auto).unwrap()).unwrap()
        };
        let one = of("{\"prompt\": \"a\", \"tag\": \"x\"}\n{\"prompt\": \"b\"}\n");
        assert_eq!(of("\n{\"prompt\":\"a\",   \"tag\": \"x\"}\n{\"prompt\": \"b\"}"), one, "the same prompts");
        for other in [
            "{\"prompt\": \"a\", \"tag\": \"y\"}\n{\"prompt\": \"b\"}\n",
            "{\"prompt\": \"a\", \"tag\": \"x\", \"negative_prompt\": \"c\"}\n{\"prompt\": \"b\"}\n",
            "{\"prompt\": \"b\"}\n{\"prompt\": \"a\", \"tag\": \"x\"}\n",
            "{\"prompt\": \"a\", \"tag\": \"x\"}\n",
        ] {
            assert_ne!(of(other), one, "{other}");
        }
    }

    #[test]
    fn only_what_a_checkpoint_knows_otherwise_has_changed() {
        let of = |all: [(&str, &str); 3]| Digests::from(all.map(|(name, digest)| (name.into(), digest.into())));
        let read = of([("a", "1"), ("b", "2"), ("c", "3")]);
        assert_eq!(changed(&read, &of([("a", "1"), ("b", "9"), ("d", "4")])), ["b"]);
    }
}
