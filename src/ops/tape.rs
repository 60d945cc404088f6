//! What our operations did while a stage ran, so that gradients can go back through it.
//!
//! candle starts every gradient as zeros and adds to them, which on each edge of its graph writes once, reads twice and
//! writes again; and its operations take three inputs and give one result. On a tape a gradient goes from operation to
//! operation as it is. A recorded result is a leaf of candle's graph: what candle's own operations do between two of ours
//! stays there, and goes back by its rules, so that no gradient is lost between the two.

use super::seed;
use candle_core::{Result, Tensor, TensorId};
use std::cell::RefCell;
use std::collections::HashMap;

/// From the gradients of an operation's results to those of its inputs, in order; at least the wanted ones are there.
type Back = Box<dyn FnOnce(&[Option<Tensor>]) -> Result<Vec<Option<Tensor>>>>;

/// One operation.
struct Note {
    inputs: Vec<Tensor>,
    results: Vec<TensorId>,
    back: Back,
}

/// Operations in the order in which they ran.
#[derive(Default)]
pub struct Tape(Vec<Note>);

thread_local! {
    /// The tape that runs, if one does.
    static RUNNING: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// Puts back what ran before, whatever happens.
struct Before(Option<Tape>);

impl Drop for Before {
    fn drop(&mut self) {
        let before = self.0.take();
        RUNNING.with(|running| *running.borrow_mut() = before);
    }
}

/// Runs `f` and records what our operations do on this thread to tensors that want a gradient.
///
/// # Errors
/// Those of `f`.
pub fn recorded<R, E>(f: impl FnOnce() -> std::result::Result<R, E>) -> std::result::Result<(R, Tape), E> {
    let before = Before(RUNNING.with(|running| running.borrow_mut().replace(Tape::default())));
    let result = f()?;
    let tape = RUNNING.with(|running| running.borrow_mut().take()).unwrap_or_default();
    drop(before);
    Ok((result, tape))
}

/// Whether a tape runs on this thread.
pub(super) fn is_running() -> bool {
    RUNNING.with(|running| running.borrow().is_some())
}

/// Records an operation, if a tape runs.
pub(super) fn note(
    inputs: &[&Tensor],
    results: &[&Tensor],
    back: impl FnOnce(&[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> + 'static,
) {
    RUNNING.with(|running| {
        if let Some(tape) = &mut *running.borrow_mut() {
            tape.0.push(Note {
                inputs: inputs.iter().map(|&input| input.clone()).collect(),
                results: results.iter().map(|result| result.id()).collect(),
                back: Box::new(back),
            });
        }
    });
}

impl Tape {
    /// Gradients of the leaves, given those of some tensors that were computed from them. The tape ends here.
    ///
    /// # Errors
    /// Those of the operations.
    pub fn backward<'a>(self, outputs: impl IntoIterator<Item = (&'a Tensor, Tensor)>) -> Result<Gradients> {
        let results = self.0.iter().flat_map(|note| note.results.iter().map(|&id| (id, None)));
        let mut gradients = Gradients { results: results.collect(), leaves: HashMap::new() };
        for (output, gradient) in outputs {
            gradients.add(output, gradient)?;
        }
        for Note { inputs, results, back } in self.0.into_iter().rev() {
            let given: Vec<_> = results.iter().map(|id| gradients.results.remove(id).flatten()).collect();
            if given.iter().all(Option::is_none) {
                continue;
            }
            for (input, gradient) in inputs.iter().zip(back(&given)?) {
                if let Some(gradient) = gradient {
                    gradients.add(input, gradient)?;
                }
            }
        }
        Ok(gradients)
    }
}

/// Gradients by tensor.
pub struct Gradients {
    /// Of results of operations that have not gone back yet.
    results: HashMap<TensorId, Option<Tensor>>,
    leaves: HashMap<TensorId, Tensor>,
}

impl Gradients {
    /// Takes the gradient of a leaf.
    pub fn remove(&mut self, leaf: &Tensor) -> Option<Tensor> {
        self.leaves.remove(&leaf.id())
    }

    /// Adds to the gradient of a tensor. One that candle's operations made of others passes it on to them at once: they are
    /// all older, so that whoever made them has not gone back yet.
    fn add(&mut self, tensor: &Tensor, gradient: Tensor) -> Result<()> {
        if self.results.contains_key(&tensor.id()) || tensor.is_variable() {
            return self.add_to(tensor.id(), gradient.detach());
        }
        if tensor.track_op() {
            let store = seed(tensor, &gradient)?.backward()?;
            for &id in store.get_ids() {
                if let Some(gradient) = store.get_id(id) {
                    self.add_to(id, gradient.detach())?;
                }
            }
        }
        Ok(())
    }

    fn add_to(&mut self, id: TensorId, gradient: Tensor) -> Result<()> {
        let sum = |before: Option<Tensor>| match before {
            None => Ok(gradient.clone()),
            Some(before) => sum_of(&before, &gradient),
        };
        match self.results.get_mut(&id) {
            Some(place) => *place = Some(sum(place.take())?),
            None => {
                let before = self.leaves.remove(&id);
                self.leaves.insert(id, sum(before)?);
            }
        }
        Ok(())
    }
}

/// The sum of two gradients.
fn sum_of(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if a.device().is_cuda() {
        return super::cuda::sum(a, b);
    }
    a + b
}
