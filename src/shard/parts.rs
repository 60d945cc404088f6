//! Parameters of which every rank keeps its part of every stage.

use super::Partition;
use crate::comm::{Call, Communicator, Pending};
use crate::error::{Error, Result};
use crate::params::{Layout, StageParams, Values};
use candle_core::{DType, Tensor};
use std::cell::{Cell, OnceCell, RefCell};
use std::rc::{Rc, Weak};

/// One vector of parameters, of which this rank keeps a shard.
pub struct Parts {
    layout: Layout,
    partition: Partition,
    /// `[S]`.
    shard: Tensor,
    /// In which the values travel and are used.
    dtype: DType,
    comm: Rc<dyn Communicator>,
    /// The stages that are in use or on their way.
    stages: RefCell<Vec<Weak<Gathering>>>,
}

impl Parts {
    /// This rank's parts of the parameters of `layout`; of `values` nothing else is read.
    pub fn cut(values: &dyn Values, layout: &Layout, dtype: DType, comm: &Rc<dyn Communicator>) -> Result<Self> {
        let shard = Partition::new(layout, comm.world_size()).read(values, layout, comm.rank(), dtype)?;
        Ok(Self::new(layout, shard, dtype, comm))
    }

    /// A shard `[S]` of the parameters of `layout`, of any type: the values are rounded to `dtype` before they travel. What
    /// changes the shard in place changes the parameters.
    pub fn new(layout: &Layout, shard: Tensor, dtype: DType, comm: &Rc<dyn Communicator>) -> Self {
        let partition = Partition::new(layout, comm.world_size());
        let stages = RefCell::new((0..partition.stages()).map(|_| Weak::new()).collect());
        Self { layout: layout.clone(), partition, shard, dtype, comm: comm.clone(), stages }
    }

    /// Begins to gather a stage, if it has parameters here; one that somebody still uses is not gathered again. That is
    /// the same on every rank, because all run the same stages in the same order.
    fn begin(&self, stage: usize) -> Result<Option<Piece<'_>>> {
        if stage >= self.partition.stages() || self.partition.flat(stage).is_empty() {
            return Ok(None);
        }
        let in_use = self.stages.borrow()[stage].upgrade();
        let gathering = match in_use {
            Some(gathering) => gathering,
            None => {
                let range = self.partition.in_shard(stage);
                let part = self.shard.narrow(0, range.start, range.len())?.to_dtype(self.dtype)?;
                let pending = Cell::new(Some(self.comm.begin(Call::AllGather, &part)?));
                let gathering = Rc::new(Gathering { pending, whole: OnceCell::new() });
                self.stages.borrow_mut()[stage] = Rc::downgrade(&gathering);
                gathering
            }
        };
        Ok(Some(Piece { parts: self, stage, gathering }))
    }
}

/// A stage's values on their way, for all who use them.
struct Gathering {
    pending: Cell<Option<Pending>>,
    whole: OnceCell<Tensor>,
}

impl Gathering {
    /// All ranks' parts, `[R * part]`.
    fn whole(&self) -> Result<&Tensor> {
        if let Some(pending) = self.pending.take() {
            let whole = pending.wait()?;
            return Ok(self.whole.get_or_init(|| whole));
        }
        self.whole.get().ok_or_else(|| Error::Failed("the parameters of a stage could not be gathered".into()))
    }
}

/// A stage of one vector.
struct Piece<'a> {
    parts: &'a Parts,
    stage: usize,
    gathering: Rc<Gathering>,
}

impl Piece<'_> {
    /// Puts the parameters in their places, each as `finish` makes it of a view on all of them.
    fn put(&self, params: &mut StageParams, finish: impl Fn(Tensor) -> Result<Tensor>) -> Result<()> {
        let (whole, start) = (self.gathering.whole()?, self.parts.partition.flat(self.stage).start);
        for e in self.parts.layout.stage(self.stage) {
            let tensor = whole.narrow(0, e.offset - start, e.len)?.reshape(e.shape.as_slice())?;
            params.put(e, finish(tensor)?);
        }
        Ok(())
    }
}

/// A stage of a [`PartSet`] on its way.
pub struct Gathered<'a> {
    slots: usize,
    frozen: Option<Piece<'a>>,
    trained: Option<Piece<'a>>,
}

impl Gathered<'_> {
    /// Whether some of the parameters are trained.
    pub(super) fn are_trained(&self) -> bool {
        self.trained.is_some()
    }

    /// The stage's parameters, the trained ones as `finish` makes them of a view.
    pub(super) fn assemble(self, finish: impl Fn(Tensor) -> Result<Tensor>) -> Result<StageParams> {
        let mut params = StageParams::absent(self.slots);
        self.frozen.map_or(Ok(()), |piece| piece.put(&mut params, Ok))?;
        self.trained.map_or(Ok(()), |piece| piece.put(&mut params, finish))?;
        Ok(params)
    }
}

/// All parameters of a model in parts: frozen ones, which sets have in common and gather once where they run together, and
/// this set's own.
pub struct PartSet {
    /// Places in each stage's list.
    slots: Rc<[usize]>,
    frozen: Rc<Parts>,
    /// None: a set without adapters.
    trained: Option<Parts>,
}

impl PartSet {
    /// A set of `slots` parameters a stage.
    pub fn new(slots: &Rc<[usize]>, frozen: &Rc<Parts>, trained: Option<Parts>) -> Self {
        Self { slots: slots.clone(), frozen: frozen.clone(), trained }
    }

    /// Begins to gather a stage. Collective.
    pub(super) fn gather(&self, stage: usize) -> Result<Gathered<'_>> {
        let trained = self.trained.as_ref().map(|parts| parts.begin(stage));
        Ok(Gathered {
            slots: self.slots[stage],
            frozen: self.frozen.begin(stage)?,
            trained: trained.transpose()?.flatten(),
        })
    }
}
