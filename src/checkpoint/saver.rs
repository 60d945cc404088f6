//! Saving beside training: a shard is taken, a thread writes it while training goes on, and the ranks agree afterwards
//! that all of it is there.
//!
//! Only the thread's work is done beside training; every agreement is made by the training threads, so that the order of
//! collectives stays that of the plan.

use super::folder::{folder_name, writing_name};
use super::manifest::{Identity, ShardEntry, TrainState};
use super::writer::{begin, commit, write_shard};
use super::{Shard, error};
use crate::comm::{Communicator, ReduceOp, exchange};
use crate::error::{Error, Result};
use crate::hostname::hostname;
use candle_core::{Device, Tensor};
use serde::{Serialize, de::DeserializeOwned};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// Saves the checkpoints of one life of a run, one at a time.
pub struct Saver {
    root: PathBuf,
    identity: Identity,
    generation: u64,
    writing: Option<Writing>,
}

/// A save whose shard this rank's thread is writing.
struct Writing {
    state: TrainState,
    thread: JoinHandle<Result<ShardEntry>>,
}

/// A checkpoint that is complete.
#[derive(Debug, Clone, PartialEq)]
pub struct Saved {
    /// Where the run stood.
    pub state: TrainState,
    /// Its folder.
    pub path: PathBuf,
}

impl Saver {
    /// For checkpoints in `root` (`OUT/checkpoints`). `generation` differs between the lives of a run, so that a rank of
    /// an earlier life that is still writing cannot write into a checkpoint of this one.
    pub fn new(root: &Path, identity: Identity, generation: u64) -> Self {
        Self { root: root.to_path_buf(), identity, generation, writing: None }
    }

    /// Begins to save this rank's shard; returns before it is written. Collective, with the same `state` on every rank,
    /// and no save under way ([`Saver::finish`]).
    ///
    /// # Errors
    /// [`Error::NotSaved`], the same on every rank: the folder cannot be made.
    pub fn begin(&mut self, state: &TrainState, shard: Shard, comm: &dyn Communicator) -> Result<()> {
        let (rank, ranks) = (comm.rank(), comm.world_size());
        let made = if rank == 0 { begin(&self.root, state.update, self.generation).map(drop) } else { Ok(()) };
        agree(comm, &self.path(state), made)?;
        let writing = self.root.join(writing_name(state.update, self.generation));
        let thread = std::thread::spawn(move || write_shard(&writing, rank, ranks, &shard));
        self.writing = Some(Writing { state: state.clone(), thread });
        Ok(())
    }

    /// Completes the save under way if every rank's shard is written by now. Collective while a save is under way, and
    /// no more than a look otherwise.
    ///
    /// # Errors
    /// As [`Saver::finish`].
    pub fn poll(&mut self, comm: &dyn Communicator) -> Result<Option<Saved>> {
        let Some(writing) = &self.writing else { return Ok(None) };
        let busy = Tensor::new(&[u32::from(!writing.thread.is_finished())], &Device::Cpu)?;
        match comm.all_reduce(&busy, ReduceOp::Max)?.to_vec1::<u32>()?[..] {
            [0] => self.finish(comm),
            _ => Ok(None),
        }
    }

    /// Waits for the save under way, if there is one, and completes it. Collective.
    ///
    /// # Errors
    /// [`Error::NotSaved`], the same on every rank, naming the first rank that failed and the cause; then there is no new
    /// checkpoint, and the earlier ones are as they were.
    pub fn finish(&mut self, comm: &dyn Communicator) -> Result<Option<Saved>> {
        let Some(Writing { state, thread }) = self.writing.take() else { return Ok(None) };
        let path = self.path(&state);
        let written = thread.join().unwrap_or_else(|_| Err(error(&path, "the thread that writes it panicked")));
        let saved = agree(comm, &path, written).and_then(|shards| {
            let done = match comm.rank() {
                0 => commit(&self.root, &state, &self.identity, shards, self.generation).map(drop),
                _ => Ok(()),
            };
            agree(comm, &path, done)
        });
        if saved.is_err() && comm.rank() == 0 {
            // Readers ignore what is left of it, and the next save clears it: no need for a second error.
            let _ = fs::remove_dir_all(self.root.join(writing_name(state.update, self.generation)));
        }
        saved.map(|_| Some(Saved { state, path }))
    }

    fn path(&self, state: &TrainState) -> PathBuf {
        self.root.join(folder_name(state.update))
    }
}

/// Every rank's value; or on every rank the same error, which names the first rank that failed and its cause.
fn agree<T: Serialize + DeserializeOwned>(comm: &dyn Communicator, path: &Path, mine: Result<T>) -> Result<Vec<T>> {
    let mine = mine.map_err(|e| format!("on {}: {e}", hostname()));
    let all: Vec<std::result::Result<T, String>> = exchange(comm, &mine)?; // [R]
    let failed = all.iter().filter(|result| result.is_err()).count();
    let others = if failed > 1 { format!(" (and {} more ranks)", failed - 1) } else { String::new() };
    let refuse = |rank, cause| Error::NotSaved {
        path: path.to_path_buf(),
        message: format!("rank {rank} {cause}{others}; the earlier checkpoints are untouched"),
    };
    all.into_iter().enumerate().map(|(rank, result)| result.map_err(|cause| refuse(rank, cause))).collect()
}
