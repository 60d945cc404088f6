//! What a training step does with a micro-batch, wherever one is taken.
//!
//! ```text
//! (x_t, t), conditioning -> velocities -> losses, dL/dv -> gradients of the trained parameters -> their sum over ranks
//!                           velocities    differentiate    accumulate                              Reduction::finish
//! ```

use crate::engine::{self, Checkpointing, Pass, Tape};
use crate::error::{Error, Result};
use crate::flow::guide;
use crate::model::Model;
use crate::objective::{Losses, Objective, Point, Requirements, TargetVelocities};
use crate::policy::Policies;
use crate::shard::{Reduction, Weights};
use candle_core::{Tensor, Var};

/// What the model is told of a micro-batch's prompts.
#[derive(Clone, Copy)]
pub struct Conditioning<'a> {
    /// Of the prompts, each `[B, ...]`.
    pub prompts: &'a [Tensor],
    /// What the velocities are guided away from; `None`: they are not guided.
    pub guidance: Option<Guidance<'a>>,
}

/// Classifier-free guidance of a micro-batch.
#[derive(Clone, Copy)]
pub struct Guidance<'a> {
    /// Conditioning of the negative prompts, each `[B, ...]`.
    pub negative: &'a [Tensor],
    /// How far the velocity is led away from theirs; 1: not at all.
    pub scale: f64,
}

/// The velocities at a micro-batch's points.
pub struct Velocities {
    /// The policy's, given the prompts: what the loss is differentiated by, `[B, C, H, W]`.
    pub policy: Tensor,
    /// The policy's given the negative prompts `[B, C, H, W]`, and the guidance's scale. No
    /// gradient flows through it.
    pub negative: Option<(Tensor, f64)>,
    /// Those that the objective asks for beside it, guided where the policy's is.
    pub targets: TargetVelocities,
}

/// The velocities that an objective with these requirements asks for, and what the policy's
/// backward pass needs. All parameter sets run a stage of the model before any runs the next
/// one. Collective where the weights are shared out.
pub fn velocities(
    model: &Model,
    policies: &Policies,
    required: Requirements,
    point: &Point,
    conditioning: Conditioning,
    checkpointing: Checkpointing,
) -> Result<(Velocities, Tape)> {
    let Policies { policy, old, reference, old_is_policy, .. } = policies;
    let mut beside = Beside { point, conditioning, passes: Vec::new() };
    let of_old = (required.old && !old_is_policy).then(|| beside.add_guided(&**old));
    let of_reference = required.reference.then(|| beside.add_guided(&**reference));
    let of_negative = conditioning.guidance.map(|guidance| beside.add(&**policy, guidance.negative));

    let own = Pass::new(&**policy, &point.x_t, &point.t, conditioning.prompts);
    let (v, all, tape) = engine::forward_beside(model, own, beside.passes, checkpointing)?;

    let old = match of_old {
        Some(places) => Some(places.velocity(&all)?),
        None => required.old.then(|| v.clone()), // the same parameters give the same velocity
    };
    let reference = of_reference.map(|places| places.velocity(&all)).transpose()?;
    let negative = of_negative.zip(conditioning.guidance).map(|(place, guidance)| (all[place].clone(), guidance.scale));
    Ok((Velocities { policy: v, negative, targets: TargetVelocities { old, reference } }, tape))
}

/// The losses `[B]`, and the gradient `[B, C, H, W]` of their sum with these `weights` `[B]` with
/// respect to the policy's velocity.
///
/// # Errors
/// [`Error::Failed`]: the objective does not depend on the velocity.
pub fn differentiate(
    objective: &dyn Objective,
    point: &Point,
    velocities: &Velocities,
    weights: &Tensor,
) -> Result<(Losses, Tensor)> {
    let v = Var::from_tensor(&velocities.policy)?;
    let guided = match &velocities.negative {
        None => v.as_tensor().clone(),
        Some((negative, scale)) => guide(&v, negative, *scale)?,
    };
    let losses = objective.losses(point, &guided, &velocities.targets)?;
    let sum = (&losses.loss * weights)?.sum_all()?;
    let dv = sum.backward()?.remove(v.as_tensor());
    let dv = dv.ok_or_else(|| Error::Failed("the objective gives the velocity no gradient".into()))?;
    Ok((losses, dv))
}

/// Adds the gradients of the trained parameters, given the velocity's gradient `dv` `[B, C, H, W]`.
/// With the `last` micro-batch of an update the sum of each stage begins its way over the ranks as
/// soon as it is complete.
pub fn accumulate(
    model: &Model,
    weights: &dyn Weights,
    tape: Tape,
    dv: &Tensor,
    reduction: &mut Reduction,
    last: bool,
) -> Result<()> {
    engine::backward(model, weights, tape, dv, |stage, gradients| {
        reduction.add(stage, gradients)?;
        if last { reduction.begin(stage) } else { Ok(()) }
    })
}

/// The passes beside the policy's own, which run with it stage by stage.
struct Beside<'a> {
    point: &'a Point,
    conditioning: Conditioning<'a>,
    passes: Vec<Pass<'a>>,
}

/// Where a parameter set's velocities are among those of all passes.
struct Places {
    prompts: usize,
    /// With the guidance's scale.
    negative: Option<(usize, f64)>,
}

impl<'a> Beside<'a> {
    /// Returns the place of its velocity.
    fn add(&mut self, weights: &'a dyn Weights, conditioning: &[Tensor]) -> usize {
        self.passes.push(Pass::new(weights, &self.point.x_t, &self.point.t, conditioning));
        self.passes.len() - 1
    }

    fn add_guided(&mut self, weights: &'a dyn Weights) -> Places {
        let Conditioning { prompts, guidance } = self.conditioning;
        let prompts = self.add(weights, prompts);
        let negative = guidance.map(|guidance| (self.add(weights, guidance.negative), guidance.scale));
        Places { prompts, negative }
    }
}

impl Places {
    /// The guided velocity `[B, C, H, W]`.
    fn velocity(&self, all: &[Tensor]) -> Result<Tensor> {
        match self.negative {
            None => Ok(all[self.prompts].clone()),
            Some((negative, scale)) => guide(&all[self.prompts], &all[negative], scale),
        }
    }
}
