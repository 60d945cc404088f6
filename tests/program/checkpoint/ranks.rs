//! Ranks as threads, and checkpoints with known content.

use candle_core::Tensor;
use flowrl_dist::checkpoint::{Identity, Reader, Saver, Shard, TrainState};
use flowrl_dist::comm::{Call, Communicator};
use flowrl_dist::digest;
use flowrl_dist::{Error, Result};
use std::cell::Cell;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, Mutex};

pub const VECTORS: [&str; 5] = ["policy", "old", "ema", "exp_avg", "exp_avg_sq"];

/// Something that one rank does just before its collective call of this number.
pub type Sabotage = (usize, usize, fn(&Path));

/// A rank that can gather; saving needs no more.
struct Rank {
    rank: usize,
    slots: Arc<Vec<Mutex<Option<Tensor>>>>,
    meet: Arc<Barrier>,
    calls: Cell<usize>,
    sabotage: Option<(Sabotage, PathBuf)>,
}

impl Communicator for Rank {
    fn rank(&self) -> usize {
        self.rank
    }
    fn world_size(&self) -> usize {
        self.slots.len()
    }
    fn call(&self, call: Call, tensor: &Tensor) -> Result<Tensor> {
        if call != Call::AllGather {
            return Err(Error::Failed(format!("saving does not need {call:?}")));
        }
        if let Some(((rank, call, act), root)) = &self.sabotage
            && (*rank, *call) == (self.rank, self.calls.get())
        {
            act(root);
        }
        self.calls.set(self.calls.get() + 1);
        *self.slots[self.rank].lock().unwrap() = Some(tensor.clone());
        self.meet.wait();
        let all: Vec<Tensor> = self.slots.iter().map(|slot| slot.lock().unwrap().clone().unwrap()).collect();
        self.meet.wait();
        Ok(Tensor::cat(&all, 0)?)
    }
    fn abort(&self, code: i32) -> ! {
        panic!("abort with code {code}")
    }
}

/// The elements of rank `rank`: its part of the first two thirds and its part of the rest, as of two stages; the last ranks
/// may have fewer or none.
pub fn owned(rank: usize, ranks: usize, total: usize) -> Vec<Range<usize>> {
    let part = |stage: Range<usize>| {
        let s = stage.len().div_ceil(ranks);
        let at = |rank: usize| (stage.start + rank * s).min(stage.end);
        at(rank)..at(rank + 1)
    };
    let cut = total * 2 / 3;
    [part(0..cut), part(cut..total)].into_iter().filter(|range| !range.is_empty()).collect()
}

/// What a checkpoint after `update` holds over one range.
pub fn content(update: u64, range: Range<usize>) -> Shard {
    content_of(update, vec![range])
}

/// One range of a checkpoint.
pub fn read(reader: &Reader, range: Range<usize>) -> Result<Shard> {
    reader.read(std::slice::from_ref(&range))
}

/// The value of element `i` of every vector after `update`, odd bit patterns among them.
pub fn content_of(update: u64, ranges: Vec<Range<usize>>) -> Shard {
    let value = |v: usize, i: usize| match i % 5 {
        3 => f32::MIN_POSITIVE / 4.0 * (i + 1) as f32,
        4 => -0.0,
        _ => (i as f32 + 0.1) * (v as f32 - 1.7) + update as f32,
    };
    let vectors = VECTORS
        .iter()
        .enumerate()
        .map(|(v, name)| (name.to_string(), ranges.iter().cloned().flatten().map(|i| value(v, i)).collect()))
        .collect();
    Shard { ranges, vectors }
}

pub fn identity(total: usize) -> Identity {
    Identity {
        config_digest: digest::of(b"config"),
        base_digest: digest::of(b"base"),
        parts: [("vae".into(), digest::of(b"vae"))].into(),
        layout_digest: digest::of(format!("blocks.0.q.lora_a [{total}, 1]").as_bytes()),
        total,
        seed: 42,
        parameters: Vec::new(),
    }
}

pub fn state(update: u64) -> TrainState {
    TrainState { update, iteration: update / 2, extra: serde_json::json!({"samples": 1u64 << 60, "note": "ok"}) }
}

/// Saves and waits for it.
pub fn save(
    root: &Path,
    state: &TrainState,
    identity: &Identity,
    shard: &Shard,
    comm: &dyn Communicator,
    generation: u64,
) -> Result<PathBuf> {
    let mut saver = Saver::new(root, identity.clone(), generation);
    saver.begin(state, shard.clone(), comm)?;
    Ok(saver.finish(comm)?.expect("a save was under way").path)
}

/// Saves with `ranks` threads; every rank's result.
pub fn save_with(
    root: &Path,
    update: u64,
    ranks: usize,
    total: usize,
    sabotage: Option<Sabotage>,
) -> Vec<Result<PathBuf>> {
    let slots: Arc<Vec<_>> = Arc::new((0..ranks).map(|_| Mutex::new(None)).collect());
    let meet = Arc::new(Barrier::new(ranks));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks)
            .map(|rank| {
                let (slots, meet) = (slots.clone(), meet.clone());
                scope.spawn(move || {
                    let sabotage = sabotage.map(|sabotage| (sabotage, root.to_path_buf()));
                    let comm = Rank { rank, slots, meet, calls: Cell::new(0), sabotage };
                    let shard = content_of(update, owned(rank, ranks, total));
                    save(root, &state(update), &identity(total), &shard, &comm, 7)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Saves with `ranks` threads, which must succeed.
pub fn saved(root: &Path, update: u64, ranks: usize, total: usize) -> PathBuf {
    let paths: Vec<PathBuf> = save_with(root, update, ranks, total, None).into_iter().map(|r| r.unwrap()).collect();
    assert!(paths.iter().all(|path| *path == paths[0]));
    paths[0].clone()
}
