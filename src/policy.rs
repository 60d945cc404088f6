//! The three sets of parameters of a run, by their four names: `policy` is trained, `old` samples and anchors,
//! `reference` is the base model; the EMA lives in the optimizer's shard and is gathered when it is evaluated.

use crate::comm::World;
use crate::error::Result;
use crate::optim::Sharded;
use crate::params::{Layout, ParamSet, Trainable};
use crate::pipeline::Pipeline;

/// Policy, old policy and base model. Frozen tensors are shared between them, not copied.
pub struct Policies {
    /// The trained parameters.
    pub policy: ParamSet,
    /// The slow copy that samples.
    pub old: ParamSet,
    /// The base model.
    pub reference: ParamSet,
    /// Whether `old` holds the same values as `policy`, so that one velocity serves for both.
    pub old_is_policy: bool,
    layout: Layout,
}

impl Policies {
    /// The sets of the optimizer's state. `old_is_policy`: the old policy was last set to the policy's values.
    pub fn new(
        pipeline: &Pipeline,
        trainable: Trainable,
        layout: &Layout,
        state: &Sharded,
        old_is_policy: bool,
        world: &World,
    ) -> Result<Self> {
        let base = &pipeline.base;
        let reference = match trainable {
            Trainable::Full => base.clone(),
            Trainable::Lora => base.without_adapters(&pipeline.model.specs()),
        };
        let policy = base.with_flat(layout, &state.gather_policy(&*world.device)?)?;
        let old = base.with_flat(layout, &state.gather_old(&*world.device)?)?;
        Ok(Self { policy, old, reference, old_is_policy, layout: layout.clone() })
    }

    /// Digest of the trained parameters of policy and old policy.
    pub fn digest(&self, layout: &Layout) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for set in [&self.policy, &self.old] {
            let bytes: Vec<u8> =
                set.flatten(layout)?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect();
            hasher.update(&bytes);
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Gathers the policy after an update.
    pub fn refresh_policy(&mut self, state: &Sharded, world: &World) -> Result<()> {
        self.policy = self.policy.with_flat(&self.layout, &state.gather_policy(&*world.device)?)?;
        self.old_is_policy = false;
        Ok(())
    }

    /// Gathers the old policy after it followed the policy with the share `eta` of itself.
    pub fn refresh_old(&mut self, state: &Sharded, eta: f64, world: &World) -> Result<()> {
        self.old = self.old.with_flat(&self.layout, &state.gather_old(&*world.device)?)?;
        self.old_is_policy = eta == 0.0;
        Ok(())
    }
}
