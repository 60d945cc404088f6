//! Parameters that are brought here stage by stage, for as long as the stage runs.

use super::parts::{Gathered, PartSet};
use crate::error::Result;
use crate::params::{ParamSet, StageParams};
use candle_core::Var;

/// A set of parameters that gives those of a stage when it runs.
pub trait Weights {
    /// Begins to bring the parameters of a stage here: what is begun one stage ahead comes beside the work on the present
    /// one.
    fn begin(&self, stage: usize) -> Result<Coming<'_>>;

    /// Whether [`Weights::begin`] is a collective call: then every rank must run the model equally often.
    fn is_collective(&self) -> bool;
}

/// A stage's parameters on their way.
pub enum Coming<'a> {
    /// They were here all the time.
    Here(&'a StageParams),
    /// They are gathered from all ranks.
    Gathered(Gathered<'a>),
}

impl Coming<'_> {
    /// Whether some of them are trained.
    pub fn are_trained(&self) -> bool {
        match self {
            Coming::Here(params) => params.iter().any(|(_, tensor)| tensor.is_variable()),
            Coming::Gathered(gathered) => gathered.are_trained(),
        }
    }

    /// The values outside any graph: running a stage on them records nothing.
    pub fn values(self) -> Result<StageParams> {
        match self {
            Coming::Here(params) => Ok(params.detached()),
            Coming::Gathered(gathered) => gathered.assemble(Ok),
        }
    }

    /// The values, the trained ones as leaves of a graph.
    pub fn leaves(self) -> Result<StageParams> {
        match self {
            Coming::Here(params) => Ok(params.clone()),
            // Copies, not views: the gradient of a view is padded to the whole vector's size.
            Coming::Gathered(gathered) => gathered.assemble(|trained| Ok(Var::from_tensor(&trained)?.into_inner())),
        }
    }
}

impl Weights for ParamSet {
    fn begin(&self, stage: usize) -> Result<Coming<'_>> {
        Ok(Coming::Here(self.stage(stage)))
    }

    fn is_collective(&self) -> bool {
        false
    }
}

impl Weights for PartSet {
    fn begin(&self, stage: usize) -> Result<Coming<'_>> {
        self.gather(stage).map(Coming::Gathered)
    }

    fn is_collective(&self) -> bool {
        true
    }
}
