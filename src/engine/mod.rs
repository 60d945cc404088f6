//! Forward and backward, block by block.
//!
//! candle keeps the whole graph until the loss is dropped. Here the forward pass records nothing but the inputs of
//! each stage, and the backward pass runs one stage again with its inputs and trainable parameters as fresh leaves,
//! reads their gradients and drops the graph. So the memory is one stage's graph and the stages' inputs, a stage's
//! parameters are needed only while it runs, and its gradients are final when its backward pass ends.

mod gradients;

pub use gradients::Gradients;

use crate::error::{Error, Result};
use crate::model::{Model, Stage, ops};
use crate::params::{ParamSet, StageParams};
use candle_core::{Tensor, Var};

/// The stages' inputs, kept by [`forward`] for [`backward`].
pub struct Tape(Vec<Vec<Tensor>>);

/// The velocity `[B, C, H, W]` at x_t `[B, C, H, W]`, t `[B]`, without a graph and keeping nothing.
pub fn velocity(model: &Model, params: &ParamSet, x_t: &Tensor, t: &Tensor, conditioning: &[Tensor]) -> Result<Tensor> {
    run(model, params, stem_inputs(x_t, t, conditioning), |_| ())
}

/// The velocity, and what the backward pass needs.
pub fn forward(
    model: &Model,
    params: &ParamSet,
    x_t: &Tensor,
    t: &Tensor,
    conditioning: &[Tensor],
) -> Result<(Tensor, Tape)> {
    let mut tape = Tape(Vec::with_capacity(model.stages.len()));
    let velocity = run(model, params, stem_inputs(x_t, t, conditioning), |inputs| tape.0.push(inputs))?;
    Ok((velocity, tape))
}

/// Adds to `gradients` those of the trainable parameters, given the gradient of the velocity `[B, C, H, W]`.
pub fn backward(
    model: &Model,
    params: &ParamSet,
    tape: Tape,
    velocity_gradient: &Tensor,
    gradients: &mut Gradients,
) -> Result<()> {
    let mut output_gradients = vec![Some(velocity_gradient.clone())];
    for (index, inputs) in tape.0.into_iter().enumerate().rev() {
        let stage = model.stages[index].as_ref();
        let (input_gradients, parameter_gradients) =
            vector_jacobian(stage, params.stage(index), inputs, &output_gradients, index > 0)?;
        gradients.add(index, parameter_gradients)?;
        output_gradients = input_gradients;
    }
    Ok(())
}

fn stem_inputs(x_t: &Tensor, t: &Tensor, conditioning: &[Tensor]) -> Vec<Tensor> {
    [x_t, t].into_iter().chain(conditioning).map(Tensor::detach).collect()
}

fn run(model: &Model, params: &ParamSet, inputs: Vec<Tensor>, mut keep: impl FnMut(Vec<Tensor>)) -> Result<Tensor> {
    let mut inputs = inputs;
    for (index, stage) in model.stages.iter().enumerate() {
        let outputs = stage.forward(&params.stage(index).detached(), &inputs)?;
        keep(std::mem::replace(&mut inputs, outputs));
    }
    inputs.pop().ok_or_else(|| Error::Failed("the model has no output".into()))
}

/// One gradient an input, and (slot, gradient) for each trainable parameter of the stage.
type StageGradients = (Vec<Option<Tensor>>, Vec<(usize, Tensor)>);

/// Gradients of `sum(outputs * output_gradients)` with respect to the inputs (if wanted) and trainable parameters.
fn vector_jacobian(
    stage: &dyn Stage,
    params: &StageParams,
    inputs: Vec<Tensor>,
    output_gradients: &[Option<Tensor>],
    wants_inputs: bool,
) -> Result<StageGradients> {
    let inputs = match wants_inputs {
        true => inputs.iter().map(|t| Ok(Var::from_tensor(t)?.into_inner())).collect::<Result<Vec<_>>>()?,
        false => inputs,
    };
    let outputs = stage.forward(params, &inputs)?;
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
    let input_gradients = inputs.iter().map(|t| if wants_inputs { store.remove(t) } else { None }).collect();
    let parameter_gradients =
        params.iter().filter(|(_, t)| t.is_variable()).filter_map(|(slot, t)| Some((slot, store.remove(t)?))).collect();
    Ok((input_gradients, parameter_gradients))
}

#[cfg(test)]
mod tests;
