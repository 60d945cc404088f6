//! Forward and backward, block by block.
//!
//! candle keeps the whole graph until the loss is dropped. Here every stage is a graph of its own, whose leaves are the
//! stage's inputs and trainable parameters. Of a checkpointed stage the forward pass records nothing but the inputs, and
//! the backward pass runs it again, reads the leaves' gradients and drops the graph. So the memory is one stage's graph
//! and the stages' inputs, a stage's parameters are needed only while it runs, and its gradients are final when its
//! backward pass ends. A stage that is not checkpointed keeps its graph, which costs its memory and saves its second run.
//! Gradients go back as far as something is trained: an input in which no trained parameter has had a hand is no leaf, and
//! the stages before the first trained one leave nothing.

use crate::error::{Error, Result};
use crate::model::{Model, Stage};
use crate::ops;
use crate::params::StageParams;
use crate::shard::{Coming, Weights};
use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

/// Which stages run again in the backward pass instead of keeping their graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Checkpointing(
    /// 0: none; 1: each; n: each n-th, counted from the first; never the last block and the head.
    pub usize,
);

impl Checkpointing {
    /// Each stage: the least memory.
    pub const EACH: Self = Self(1);

    /// Whether stage `stage` of `stages` runs again in the backward pass. Never the last block or the head: the backward
    /// pass starts with them, and it holds one block's graph at any time anyway.
    pub(crate) fn of(self, stage: usize, stages: usize) -> bool {
        self.0 > 0 && stage + 2 < stages && stage.is_multiple_of(self.0)
    }
}

/// One pass through the model: by which weights, from which inputs.
pub struct Pass<'a> {
    weights: &'a dyn Weights,
    /// Inputs of the next stage: at first the model's, then the outputs of the stage that ran.
    inputs: Vec<Tensor>,
}

impl<'a> Pass<'a> {
    /// From x_t `[B, C, H, W]`, t `[B]` and the conditioning.
    pub fn new(weights: &'a dyn Weights, x_t: &Tensor, t: &Tensor, conditioning: &[Tensor]) -> Self {
        Self { weights, inputs: [x_t, t].into_iter().chain(conditioning).map(Tensor::detach).collect() }
    }

    /// Runs a stage outside any graph. Returns the inputs that it saw.
    fn run(&mut self, stage: &dyn Stage, params: Coming) -> Result<Vec<Tensor>> {
        let inputs: Vec<_> = self.inputs.iter().map(Tensor::detach).collect();
        self.inputs = stage.forward(&params.values()?, &inputs)?;
        Ok(inputs)
    }

    /// The last stage's output.
    fn velocity(mut self) -> Result<Tensor> {
        let velocity = self.inputs.pop().ok_or_else(|| Error::Failed("the model has no output".into()))?;
        Ok(velocity.detach())
    }
}

/// What [`forward`] keeps of each stage for [`backward`].
pub struct Tape(Vec<Recorded>);

/// What is kept of one stage.
enum Recorded {
    /// Nothing: no gradient gets there.
    Constant,
    /// The inputs and which of them want a gradient: the stage runs again.
    Inputs(Vec<Tensor>, Vec<bool>),
    /// Inputs, parameters and outputs, and with them the graph.
    Graph(Graph),
}

/// A stage that has run on leaves.
struct Graph {
    inputs: Vec<Tensor>,
    params: StageParams,
    outputs: Vec<Tensor>,
    operations: ops::Tape,
}

/// Where the graph of a stage comes from in the backward pass.
enum Source<'a> {
    Constant,
    Kept(Graph),
    /// The stage runs again, on parameters that are on their way.
    Again(Coming<'a>, Vec<Tensor>, Vec<bool>),
}

/// The velocity `[B, C, H, W]` at x_t `[B, C, H, W]`, t `[B]`, without a graph and keeping nothing.
pub fn velocity(
    model: &Model,
    weights: &dyn Weights,
    x_t: &Tensor,
    t: &Tensor,
    conditioning: &[Tensor],
) -> Result<Tensor> {
    let mut all = velocities(model, vec![Pass::new(weights, x_t, t, conditioning)])?;
    all.pop().ok_or_else(|| Error::Failed("a pass has no velocity".into()))
}

/// The velocity of each pass. All run a stage before any runs the next one, so that what their weights have in common is
/// gathered once.
pub fn velocities(model: &Model, mut passes: Vec<Pass>) -> Result<Vec<Tensor>> {
    let weights: Vec<&dyn Weights> = passes.iter().map(|pass| pass.weights).collect();
    in_order(model, &weights, |stage, params| {
        passes.iter_mut().zip(params).try_for_each(|(pass, params)| pass.run(&*model.stages[stage], params).map(drop))
    })?;
    passes.into_iter().map(Pass::velocity).collect()
}

/// The velocity, and what the backward pass needs.
pub fn forward(
    model: &Model,
    weights: &dyn Weights,
    x_t: &Tensor,
    t: &Tensor,
    conditioning: &[Tensor],
    checkpointing: Checkpointing,
) -> Result<(Tensor, Tape)> {
    let (velocity, _, tape) =
        forward_beside(model, Pass::new(weights, x_t, t, conditioning), Vec::new(), checkpointing)?;
    Ok((velocity, tape))
}

/// The first pass's velocity, the others' velocities, stage by stage as [`velocities`], and what the backward pass of the
/// first needs.
pub fn forward_beside(
    model: &Model,
    mut first: Pass,
    mut others: Vec<Pass>,
    checkpointing: Checkpointing,
) -> Result<(Tensor, Vec<Tensor>, Tape)> {
    let weights: Vec<&dyn Weights> = std::iter::once(&first).chain(&others).map(|pass| pass.weights).collect();
    let mut tape = Vec::with_capacity(model.stages.len());
    let mut wanted = vec![false; first.inputs.len()]; // which inputs of the next stage want a gradient
    in_order(model, &weights, |index, mut params| {
        let (stage, own) = (&*model.stages[index], params.remove(0));
        let reached = own.are_trained() || wanted.contains(&true);
        if reached && !checkpointing.of(index, model.stages.len()) {
            let (inputs, params) = (leaves(&first.inputs, &wanted)?, own.leaves()?);
            let (outputs, operations) = ops::recorded(|| stage.forward(&params, &inputs))?;
            wanted = outputs.iter().map(Tensor::track_op).collect();
            // A leaf is one of the next stage's graph as well, which then needs no copy of it.
            let next = |output: &Tensor| if output.is_variable() { output.clone() } else { output.detach() };
            first.inputs = outputs.iter().map(next).collect();
            tape.push(Recorded::Graph(Graph { inputs, params, outputs, operations }));
        } else {
            let inputs = first.run(stage, own)?;
            let through = |output: &Tensor| inputs.iter().position(|input| input.id() == output.id());
            let next = |output| through(output).map_or(reached, |input| wanted[input]);
            let next = first.inputs.iter().map(next).collect();
            let now = std::mem::replace(&mut wanted, next);
            tape.push(if reached { Recorded::Inputs(inputs, now) } else { Recorded::Constant });
        }
        others.iter_mut().zip(params).try_for_each(|(pass, params)| pass.run(stage, params).map(drop))
    })?;
    let others = others.into_iter().map(Pass::velocity).collect::<Result<_>>()?;
    Ok((first.velocity()?, others, Tape(tape)))
}

/// Gives `run` each stage with its parameters of each set, from the first stage to the last; those of the next stage are on
/// their way meanwhile.
fn in_order<'a>(
    model: &Model,
    weights: &[&'a dyn Weights],
    mut run: impl FnMut(usize, Vec<Coming<'a>>) -> Result<()>,
) -> Result<()> {
    let begin = |stage| weights.iter().map(|weights| weights.begin(stage)).collect::<Result<Vec<_>>>();
    let mut coming = (0..model.stages.len()).map(begin).peekable();
    let mut stage = 0;
    while let Some(params) = coming.next() {
        coming.peek(); // begins the next one's
        run(stage, params?)?;
        stage += 1;
    }
    Ok(())
}

/// Gives `take` the gradients of each stage's trainable parameters, by slot, from the last stage to the first, given the
/// gradient of the velocity `[B, C, H, W]`.
pub fn backward(
    model: &Model,
    weights: &dyn Weights,
    tape: Tape,
    velocity_gradient: &Tensor,
    mut take: impl FnMut(usize, Vec<(usize, Tensor)>) -> Result<()>,
) -> Result<()> {
    let mut output_gradients = vec![Some(velocity_gradient.clone())];
    let begin = |(index, recorded): (usize, Recorded)| -> Result<_> {
        let source = match recorded {
            Recorded::Constant => Source::Constant,
            Recorded::Inputs(inputs, wanted) => Source::Again(weights.begin(index)?, inputs, wanted),
            Recorded::Graph(graph) => Source::Kept(graph),
        };
        Ok((index, source))
    };
    let mut coming = tape.0.into_iter().enumerate().rev().map(begin).peekable();
    while let Some(next) = coming.next() {
        coming.peek(); // begins the one before
        let (index, source) = next?;
        let graph = match source {
            Source::Constant => {
                take(index, Vec::new())?;
                continue;
            }
            Source::Kept(graph) => graph,
            Source::Again(params, inputs, wanted) => {
                let (inputs, params) = (leaves(&inputs, &wanted)?, params.leaves()?);
                let (outputs, operations) = ops::recorded(|| model.stages[index].graph(&params, &inputs))?;
                Graph { inputs, params, outputs, operations }
            }
        };
        let (input_gradients, parameter_gradients) = vector_jacobian(graph, &output_gradients)?;
        take(index, parameter_gradients)?;
        output_gradients = input_gradients;
    }
    Ok(())
}

/// A stage's inputs, those that want a gradient as leaves of its graph.
fn leaves(inputs: &[Tensor], wanted: &[bool]) -> Result<Vec<Tensor>> {
    let leaf = |(input, wanted): (&Tensor, &bool)| match wanted {
        true => Ok(Var::from_tensor(input)?.into_inner()),
        false => Ok(input.detach()),
    };
    inputs.iter().zip(wanted).map(leaf).collect()
}

/// One gradient an input, and (slot, gradient) for each trainable parameter of the stage.
type StageGradients = (Vec<Option<Tensor>>, Vec<(usize, Tensor)>);

/// Gradients of `sum(outputs * output_gradients)` with respect to the inputs that are leaves and the trainable
/// parameters. The graph ends here.
fn vector_jacobian(graph: Graph, output_gradients: &[Option<Tensor>]) -> Result<StageGradients> {
    let Graph { inputs, params, outputs, operations } = graph;
    let seeds = outputs.iter().zip(output_gradients).filter_map(|(output, gradient)| Some((output, gradient.clone()?)));
    let mut gradients = operations.backward(seeds)?;
    let mut of = |leaf: &Tensor| if leaf.is_variable() { gradients.remove(leaf) } else { None };
    let of_inputs = inputs.iter().map(&mut of).collect();
    let of_parameters = params.iter().filter_map(|(slot, parameter)| Some((slot, of(parameter)?))).collect();
    Ok((of_inputs, of_parameters))
}

#[cfg(test)]
mod tests;
