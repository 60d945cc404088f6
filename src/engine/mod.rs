//! Forward and backward, block by block.
//!
//! candle keeps the whole graph until the loss is dropped. Here every stage is a graph of its own, whose leaves are the
//! stage's inputs and trainable parameters. Of a checkpointed stage the forward pass records nothing but the inputs, and
//! the backward pass runs it again, reads the leaves' gradients and drops the graph. So the memory is one stage's graph
//! and the stages' inputs, a stage's parameters are needed only while it runs, and its gradients are final when its
//! backward pass ends. A stage that is not checkpointed keeps its graph, which costs its memory and saves its second run.

use crate::error::{Error, Result};
use crate::model::{Model, ops};
use crate::params::{ParamSet, StageParams};
use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

/// Which stages run again in the backward pass instead of keeping their graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Checkpointing(
    /// 0: none; 1: each; n: each n-th, counted from the first.
    pub usize,
);

impl Checkpointing {
    /// Each stage: the least memory.
    pub const EACH: Self = Self(1);

    fn of(self, stage: usize) -> bool {
        self.0 > 0 && stage.is_multiple_of(self.0)
    }
}

/// What [`forward`] keeps of each stage for [`backward`].
pub struct Tape(Vec<Recorded>);

/// A stage's inputs, and the outputs with their graph if it keeps one.
struct Recorded {
    inputs: Vec<Tensor>,
    outputs: Option<Vec<Tensor>>,
}

/// The velocity `[B, C, H, W]` at x_t `[B, C, H, W]`, t `[B]`, without a graph and keeping nothing.
pub fn velocity(model: &Model, params: &ParamSet, x_t: &Tensor, t: &Tensor, conditioning: &[Tensor]) -> Result<Tensor> {
    let mut inputs = stem_inputs(x_t, t, conditioning);
    for (index, stage) in model.stages.iter().enumerate() {
        inputs = stage.forward(&params.stage(index).detached(), &inputs)?;
    }
    velocity_of(inputs)
}

/// The velocity, and what the backward pass needs.
pub fn forward(
    model: &Model,
    params: &ParamSet,
    x_t: &Tensor,
    t: &Tensor,
    conditioning: &[Tensor],
    checkpointing: Checkpointing,
) -> Result<(Tensor, Tape)> {
    let mut tape = Vec::with_capacity(model.stages.len());
    let mut inputs = stem_inputs(x_t, t, conditioning);
    for (index, stage) in model.stages.iter().enumerate() {
        let (recorded, outputs) = if checkpointing.of(index) {
            let outputs = stage.forward(&params.stage(index).detached(), &inputs)?;
            (Recorded { inputs, outputs: None }, outputs)
        } else {
            let inputs = leaves(inputs, index)?;
            let outputs = stage.forward(params.stage(index), &inputs)?;
            let values = outputs.iter().map(Tensor::detach).collect();
            (Recorded { inputs, outputs: Some(outputs) }, values)
        };
        tape.push(recorded);
        inputs = outputs;
    }
    Ok((velocity_of(inputs)?, Tape(tape)))
}

/// Gives `take` the gradients of each stage's trainable parameters, by slot, from the last stage to the first, given the
/// gradient of the velocity `[B, C, H, W]`.
pub fn backward(
    model: &Model,
    params: &ParamSet,
    tape: Tape,
    velocity_gradient: &Tensor,
    mut take: impl FnMut(usize, Vec<(usize, Tensor)>) -> Result<()>,
) -> Result<()> {
    let mut output_gradients = vec![Some(velocity_gradient.clone())];
    for (index, Recorded { inputs, outputs }) in tape.0.into_iter().enumerate().rev() {
        let stage = params.stage(index);
        let (inputs, outputs) = match outputs {
            Some(outputs) => (inputs, outputs),
            None => {
                let inputs = leaves(inputs, index)?;
                let outputs = model.stages[index].forward(stage, &inputs)?;
                (inputs, outputs)
            }
        };
        let (input_gradients, parameter_gradients) = vector_jacobian(stage, &inputs, outputs, &output_gradients)?;
        take(index, parameter_gradients)?;
        output_gradients = input_gradients;
    }
    Ok(())
}

fn stem_inputs(x_t: &Tensor, t: &Tensor, conditioning: &[Tensor]) -> Vec<Tensor> {
    [x_t, t].into_iter().chain(conditioning).map(Tensor::detach).collect()
}

fn velocity_of(mut outputs: Vec<Tensor>) -> Result<Tensor> {
    outputs.pop().ok_or_else(|| Error::Failed("the model has no output".into()))
}

/// A stage's inputs as leaves of its graph; nobody wants the gradients of the first one's.
fn leaves(inputs: Vec<Tensor>, stage: usize) -> Result<Vec<Tensor>> {
    match stage {
        0 => Ok(inputs),
        _ => inputs.iter().map(|t| Ok(Var::from_tensor(t)?.into_inner())).collect(),
    }
}

/// One gradient an input, and (slot, gradient) for each trainable parameter of the stage.
type StageGradients = (Vec<Option<Tensor>>, Vec<(usize, Tensor)>);

/// Gradients of `sum(outputs * output_gradients)` with respect to the inputs that are leaves and the trainable
/// parameters. Takes the outputs: their graph ends here.
fn vector_jacobian(
    params: &StageParams,
    inputs: &[Tensor],
    outputs: Vec<Tensor>,
    output_gradients: &[Option<Tensor>],
) -> Result<StageGradients> {
    let mut root: Option<Tensor> = None;
    for (output, gradient) in outputs.iter().zip(output_gradients) {
        if let (true, Some(gradient)) = (output.track_op(), gradient) {
            let seeded = ops::seed(output, gradient)?;
            root = Some(match root {
                None => seeded,
                Some(root) => (root + seeded)?,
            });
        }
    }
    let Some(root) = root else { return Ok((vec![None; inputs.len()], Vec::new())) };
    let mut store = root.backward()?;
    let input_gradients = inputs.iter().map(|t| if t.is_variable() { store.remove(t) } else { None }).collect();
    let parameter_gradients =
        params.iter().filter(|(_, t)| t.is_variable()).filter_map(|(slot, t)| Some((slot, store.remove(t)?))).collect();
    Ok((input_gradients, parameter_gradients))
}

#[cfg(test)]
mod tests;
