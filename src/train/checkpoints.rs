//! The checkpoints of a run: written beside training, the last ones and the best one kept.

use super::state::{Evaluated, RunState};
use crate::checkpoint::{self, Identity, Saved, Saver, Shard};
use crate::comm::{Communicator, phase};
use crate::config::RunSection;
use crate::error::{Error, Result};
use std::path::PathBuf;

/// Saves where a run stands, and knows which checkpoints are to be kept. All of it is collective.
pub(super) struct CheckpointManager {
    saver: Saver,
    root: PathBuf,
    keep_last: usize,
    keep_best: bool,
    /// The last evaluation.
    evaluated: Option<Evaluated>,
    /// The best evaluation of those that were saved.
    best: Option<Evaluated>,
    /// What that is once the save under way is complete.
    next_best: Option<Evaluated>,
    /// Why the last checkpoint is not there.
    unsaved: Option<Error>,
}

impl CheckpointManager {
    /// For a run of this identity that begins, or goes on, with this `best` evaluation;
    /// `generation` as [`Saver::new`].
    pub fn new(run: &RunSection, identity: Identity, best: Option<Evaluated>, generation: u64) -> Self {
        let root = checkpoint::root(&run.out);
        Self {
            saver: Saver::new(&root, identity, generation),
            root,
            keep_last: run.keep_last,
            keep_best: run.keep_best,
            evaluated: None,
            best,
            next_best: None,
            unsaved: None,
        }
    }

    /// Takes note of an evaluation, which makes the checkpoint of its update a candidate for the
    /// best one.
    pub fn evaluated(&mut self, evaluation: Option<Evaluated>) {
        self.evaluated = evaluation;
    }

    /// The best evaluation of all checkpoints, one of `update` included.
    pub fn best_with(&self, update: u64) -> Option<Evaluated> {
        let new = self.evaluated.filter(|evaluation| evaluation.update == update);
        match (self.best, new) {
            (Some(old), Some(new)) if new.reward > old.reward => Some(new),
            (old, new) => old.or(new),
        }
    }

    /// Begins a checkpoint; training goes on while it is written. None may be under way
    /// ([`Self::wait`]).
    pub fn begin(&mut self, state: &RunState, shard: Shard, comm: &dyn Communicator) -> Result<()> {
        phase("checkpoint");
        self.next_best = state.best;
        let begun = self.saver.begin(&state.to_checkpoint()?, shard, comm);
        self.tolerate(begun.map(|()| None), comm)
    }

    /// Completes a checkpoint that has been written meanwhile.
    pub fn poll(&mut self, comm: &dyn Communicator) -> Result<()> {
        let saved = self.saver.poll(comm);
        self.tolerate(saved, comm)
    }

    /// Waits for the checkpoint under way, if there is one, and completes it.
    pub fn wait(&mut self, comm: &dyn Communicator) -> Result<()> {
        phase("checkpoint");
        let saved = self.saver.finish(comm);
        self.tolerate(saved, comm)
    }

    /// Waits for the last checkpoint; now there is no later chance.
    ///
    /// # Errors
    /// [`Error::NotSaved`]: it could not be written.
    pub fn finish(&mut self, comm: &dyn Communicator) -> Result<()> {
        self.wait(comm)?;
        self.unsaved.take().map_or(Ok(()), Err)
    }

    /// A checkpoint that could not be written does not end the run: a later one may succeed.
    fn tolerate(&mut self, saved: Result<Option<Saved>>, comm: &dyn Communicator) -> Result<()> {
        match saved {
            Ok(None) => Ok(()),
            Ok(Some(saved)) => {
                tracing::debug!("saved {}", saved.path.display());
                self.unsaved = None;
                self.best = self.next_best;
                if comm.rank() == 0
                    && let Err(e) = self.keep(saved.state.update)
                {
                    tracing::warn!("{e}; older checkpoints are not deleted");
                }
                Ok(())
            }
            Err(e @ Error::NotSaved { .. }) => {
                tracing::warn!("{e}; training goes on, and the next checkpoint may succeed");
                self.unsaved = Some(e);
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Names the best checkpoint and deletes those that are neither that nor new. By rank 0, after
    /// a save of `update`.
    fn keep(&self, update: u64) -> Result<()> {
        let best = self.best.map(|best| best.update);
        if best == Some(update) {
            checkpoint::set_best(&self.root, update)?;
        }
        checkpoint::prune(&self.root, self.keep_last, best.filter(|_| self.keep_best)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::fresh;
    use super::*;
    use crate::comm::Solo;
    use crate::config::RunConfig;
    use std::collections::BTreeMap;

    fn manager(out: &std::path::Path) -> CheckpointManager {
        let run = RunSection { out: out.into(), keep_last: 1, ..RunConfig::load(None, &[]).unwrap().run };
        let digest = || "0".to_owned();
        let identity = Identity {
            parts: Default::default(),
            config_digest: digest(),
            base_digest: digest(),
            layout_digest: digest(),
            total: 2,
            seed: 1,
            parameters: Vec::new(),
        };
        CheckpointManager::new(&run, identity, None, 1)
    }

    /// Two parameters, all of them.
    fn shard() -> Shard {
        let all = 0..2;
        Shard { ranges: Vec::from([all]), vectors: BTreeMap::from([("policy".to_owned(), vec![1.0; 2])]) }
    }

    /// Saves the state after `update` and waits for it.
    fn save(manager: &mut CheckpointManager, update: u64) {
        let state = RunState { update, best: manager.best_with(update), ..fresh() };
        manager.begin(&state, shard(), &Solo).unwrap();
        manager.finish(&Solo).unwrap();
    }

    #[test]
    fn the_best_is_the_best_of_what_was_both_evaluated_and_saved() {
        let folder = tempfile::tempdir().unwrap();
        let root = checkpoint::root(folder.path());
        let mut manager = manager(folder.path());
        let evaluated = |update, reward| Some(Evaluated { update, reward });
        let kept = || -> Vec<u64> { checkpoint::list(&root).unwrap().iter().map(|found| found.update).collect() };

        save(&mut manager, 5);
        assert_eq!((manager.best, kept()), (None, vec![5]));
        manager.evaluated(evaluated(10, 0.5));
        assert_eq!((manager.best_with(10), manager.best_with(15)), (evaluated(10, 0.5), None), "15 was not evaluated");
        save(&mut manager, 10);
        assert_eq!((manager.best, kept()), (evaluated(10, 0.5), vec![10]));
        manager.evaluated(evaluated(20, 0.4));
        save(&mut manager, 20);
        assert_eq!((manager.best, kept()), (evaluated(10, 0.5), vec![10, 20]), "the best one and the last one");
        manager.evaluated(evaluated(30, 0.6));
        save(&mut manager, 30);
        assert_eq!((manager.best, kept()), (evaluated(30, 0.6), vec![30]));
        let newest = checkpoint::newest(&root).unwrap().unwrap();
        let state = RunState::of_checkpoint(checkpoint::open(&newest.path).unwrap().state()).unwrap();
        assert_eq!((state.update, state.best), (30, evaluated(30, 0.6)));
    }

    #[test]
    fn a_checkpoint_that_cannot_be_written_is_told_at_the_end_and_forgotten_after_a_later_one() {
        let folder = tempfile::tempdir().unwrap();
        let root = checkpoint::root(folder.path());
        let mut manager = manager(folder.path());
        std::fs::write(&root, "in the way").unwrap();
        manager.begin(&fresh(), shard(), &Solo).unwrap();
        manager.wait(&Solo).unwrap();
        std::fs::remove_file(&root).unwrap();
        save(&mut manager, 1);

        std::fs::remove_dir_all(&root).unwrap();
        std::fs::write(&root, "in the way").unwrap();
        manager.begin(&fresh(), shard(), &Solo).unwrap();
        assert!(matches!(manager.finish(&Solo), Err(Error::NotSaved { .. })));
    }
}
