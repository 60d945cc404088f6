use super::pipeline::Pipeline;
use candle_core::{DType, Device};
use flowrl_dist::comm::{Solo, ThreadGroup};
use flowrl_dist::model::text::{Embeddings, Encoding, TextEncoders};
use flowrl_dist::pipeline::{Filled, PromptCache};
use flowrl_dist::{Error, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const PROMPTS: [&str; 5] = ["the cat", "a dog", "", "hello world", "a dog"];
const UNIQUE: usize = 4;

fn bits(embeddings: &Embeddings) -> [Vec<f32>; 2] {
    [&embeddings.context, &embeddings.pooled].map(|t| t.flatten_all().unwrap().to_vec1().unwrap())
}

fn fill(cache: &PromptCache) -> Filled {
    cache.fill(&PROMPTS, &Solo, &Device::Cpu).unwrap()
}

/// The files in the only folder of the cache, sorted.
fn entries(root: &Path) -> Vec<PathBuf> {
    let folders: Vec<_> = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(folders.len(), 1);
    let mut files: Vec<_> = fs::read_dir(&folders[0]).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn every_prompt_is_encoded_once_by_any_number_of_ranks() -> Result<()> {
    let pipeline = Pipeline::new();
    let encoding = pipeline.encoding();
    let encoders = TextEncoders::load(&encoding, &Device::Cpu)?;
    let one = |prompt: &&str| bits(&encoders.encode(&[prompt]).unwrap());
    let expected: Vec<_> = PROMPTS.iter().map(one).collect();
    for ranks in [1, 2, 3, 6] {
        let root = tempfile::tempdir().unwrap();
        let rank = |again: bool| {
            ThreadGroup::run(ranks, |world| {
                let cache = PromptCache::open(root.path(), encoding.clone())?;
                let filled = cache.fill(&PROMPTS, &*world.host, &Device::Cpu)?;
                // All are there for every rank, whoever encoded them; without the encoders.
                let all = cache.get(&PROMPTS, &Device::Cpu)?;
                assert_eq!(all.context.dim(0)?, PROMPTS.len());
                for (i, expected) in expected.iter().enumerate() {
                    let own = Embeddings { context: all.context.get(i)?, pooled: all.pooled.get(i)? };
                    assert_eq!(&bits(&own), expected, "again {again}");
                }
                Ok((filled.found, filled.encoded))
            })
        };
        let sum = |all: Vec<(usize, usize)>| all.iter().fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
        assert_eq!(sum(rank(false)?), (0, UNIQUE), "{ranks} ranks");
        assert_eq!(sum(rank(true)?), (UNIQUE, 0), "{ranks} ranks");
        assert_eq!(entries(root.path()).len(), UNIQUE);
    }
    Ok(())
}

/// All that is missing lies in one rank's share: it is dealt out to both.
#[test]
fn what_is_missing_is_dealt_out_evenly() -> Result<()> {
    let (pipeline, root) = (Pipeline::new(), tempfile::tempdir().unwrap());
    let prompts: Vec<String> = (0..8).map(|i| format!("prompt {i}")).collect();
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let there: Vec<&str> = prompts.iter().copied().step_by(2).collect();
    PromptCache::open(root.path(), pipeline.encoding())?.fill(&there, &Solo, &Device::Cpu)?;
    let encoding = pipeline.encoding();
    let filled = ThreadGroup::run(2, |world| {
        PromptCache::open(root.path(), encoding.clone())?.fill(&prompts, &*world.host, &Device::Cpu)
    })?;
    assert_eq!(filled, [Filled { found: 4, encoded: 2 }, Filled { found: 0, encoded: 2 }]);
    Ok(())
}

#[test]
fn ranks_with_other_encoders_are_refused() {
    let (pipeline, root) = (Pipeline::new(), tempfile::tempdir().unwrap());
    let encoding = pipeline.encoding();
    let error = ThreadGroup::run(2, |world| {
        let t5_tokens = encoding.t5_tokens + world.rank();
        PromptCache::open(root.path(), Encoding { t5_tokens, ..encoding.clone() })?.fill(
            &PROMPTS,
            &*world.host,
            &Device::Cpu,
        )
    });
    let Err(Error::Usage(line)) = error else { panic!("{error:?}") };
    assert!(line.starts_with("rank 1 has other text encoders in ") && line.contains("same files"), "{line}");
}

#[test]
fn the_encoders_are_read_only_for_a_prompt_that_is_missing() {
    let (pipeline, root) = (Pipeline::new(), tempfile::tempdir().unwrap());
    let cache = PromptCache::open(root.path(), pipeline.encoding()).unwrap();
    fill(&cache);
    for part in ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer"] {
        pipeline.remove(part);
    }
    assert_eq!(fill(&cache), Filled { found: UNIQUE, encoded: 0 });
    cache.fill(&["another"], &Solo, &Device::Cpu).unwrap_err();
}

/// Runs fill the same cache at the same time, and a bad disk halves an entry now and then.
#[test]
fn runs_may_write_the_same_entries_at_once() {
    let (pipeline, root) = (Pipeline::new(), tempfile::tempdir().unwrap());
    let encoding = pipeline.encoding();
    let encoders = TextEncoders::load(&encoding, &Device::Cpu).unwrap();
    let expected = PROMPTS.map(|prompt| bits(&encoders.encode(&[prompt]).unwrap()));
    let get = |cache: &PromptCache| PROMPTS.map(|prompt| bits(&cache.get(&[prompt], &Device::Cpu).unwrap()));
    let run = |damage: bool| {
        let cache = PromptCache::open(root.path(), encoding.clone()).unwrap();
        for round in 0..3 {
            fill(&cache);
            if damage {
                let whole = |path: &PathBuf| path.extension().is_some_and(|e| e == "safetensors");
                let path = entries(root.path()).into_iter().filter(whole).nth(round).unwrap();
                let bytes = fs::read(&path).unwrap();
                let half = tempfile::NamedTempFile::new_in(root.path().join("..")).unwrap();
                fs::write(half.path(), &bytes[..bytes.len() / 2]).unwrap();
                half.persist(&path).unwrap();
            } else {
                assert_eq!(get(&cache), expected);
            }
        }
    };
    for damage in [false, true] {
        std::thread::scope(|scope| (0..6).for_each(|_| drop(scope.spawn(|| run(damage)))));
    }
    let cache = PromptCache::open(root.path(), encoding.clone()).unwrap();
    assert!(fill(&cache).encoded > 0);
    assert_eq!(get(&cache), expected);
    assert_eq!(entries(root.path()).len(), UNIQUE, "nothing is left but the entries");
}

/// A damaged entry is never returned, and encoded again at the next start.
#[test]
fn damaged_and_foreign_entries_are_encoded_again() {
    let (pipeline, root) = (Pipeline::new(), tempfile::tempdir().unwrap());
    let cache = PromptCache::open(root.path(), pipeline.encoding()).unwrap();
    fill(&cache);
    let expected = bits(&cache.get(&PROMPTS, &Device::Cpu).unwrap());
    let files = entries(root.path());
    let whole = fs::read(&files[0]).unwrap();
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let context = whole.windows(8).position(|w| w == b"\"context").unwrap();
    let damages = [
        ("nothing", Vec::new()),
        ("half", whole[..whole.len() / 2].to_vec()),
        ("one byte short", whole[..whole.len() - 1].to_vec()),
        ("one byte more", [&whole[..], &[0]].concat()),
        ("a value of the first tensor", flipped(whole.len() - 4000)),
        ("the last bit", flipped(whole.len() - 1)),
        ("the length of the header", flipped(0)),
        ("a name in the header", flipped(context + 2)),
        ("another prompt's", fs::read(&files[1]).unwrap()),
    ];
    for (damage, bytes) in damages {
        fs::write(&files[0], bytes).unwrap();
        let error = cache.get(&PROMPTS, &Device::Cpu).unwrap_err();
        assert!(matches!(&error, Error::File { path, .. } if *path == files[0]), "{damage}: {error}");
        assert_eq!(fill(&cache), Filled { found: UNIQUE - 1, encoded: 1 }, "{damage}");
        assert_eq!(bits(&cache.get(&PROMPTS, &Device::Cpu).unwrap()), expected, "{damage}");
        assert_eq!(entries(root.path()), files, "{damage}");
    }
}

#[test]
fn a_prompt_that_was_not_encoded_is_an_error() {
    let (pipeline, root) = (Pipeline::new(), tempfile::tempdir().unwrap());
    let cache = PromptCache::open(root.path(), pipeline.encoding()).unwrap();
    fill(&cache);
    let message = cache.get(&["a dog", "a dog "], &Device::Cpu).unwrap_err().to_string();
    assert!(message.contains("the embedding of \"a dog \" is not there"), "{message}");
}

/// Entries in the folder of other encoders would be theirs.
#[test]
fn whatever_decides_an_embedding_is_in_the_digest() {
    let pipeline = Pipeline::new();
    let digest = |encoding: &Encoding| encoding.digest().unwrap();
    let encoding = pipeline.encoding();
    let first = digest(&encoding);
    assert_eq!(digest(&encoding), first);
    let mut seen = vec![first.clone()];
    let mut differs = |what: &str, digest: String| {
        assert!(!seen.contains(&digest), "{what}");
        seen.push(digest);
    };
    differs("tokens", digest(&Encoding { t5_tokens: 13, ..encoding.clone() }));
    differs("type", digest(&Encoding { dtype: DType::BF16, ..encoding.clone() }));
    pipeline.change_weights("text_encoder_3", |tensors| {
        let norm = tensors.get_mut("encoder.final_layer_norm.weight").unwrap();
        *norm = (&*norm + 1e-6).unwrap();
    });
    differs("weights", digest(&encoding));
    pipeline.change_config("text_encoder", "layer_norm_eps", 1e-6);
    differs("configuration", digest(&encoding));
    let merges = pipeline.path("tokenizer_2/merges.txt");
    let text = fs::read_to_string(&merges).unwrap();
    fs::write(&merges, text.trim_end().rsplit_once('\n').unwrap().0).unwrap();
    differs("tokenizer", digest(&encoding));
    pipeline.remove("text_encoder_3");
    differs("no T5", digest(&encoding));

    // The folder itself does not count: the same pipeline elsewhere has the same entries.
    assert_eq!(digest(&Pipeline::new().encoding()), first);
}

#[test]
fn what_killed_runs_left_is_removed_after_a_day() {
    let (pipeline, root) = (Pipeline::new(), tempfile::tempdir().unwrap());
    let cache = PromptCache::open(root.path(), pipeline.encoding()).unwrap();
    fill(&cache);
    let folder = entries(root.path())[0].parent().unwrap().to_path_buf();
    let leftover = |name: &str, hours: u64| {
        let path = folder.join(name);
        let file = File::create(&path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
        path
    };
    let (old, young) = (leftover(".writing-old", 25), leftover(".writing-young", 1));
    fill(&cache);
    assert!(!old.exists() && young.exists());
    assert_eq!(entries(root.path()).len(), UNIQUE + 1);
}
