//! What the file of a method has to say.

use super::Objective;
use crate::advantage::{AdvantageMap, Map};
use crate::checks::Check;
use crate::optim::{OldPolicyDecay, OldPolicySchedule};

/// What the file of a method says of it. Its configuration implements this: a struct of its keys with their defaults.
///
/// A key that counts only beside certain values of the others is an `Option`: nothing where it is left out, refused by
/// [`MethodSpec::check`] where it would count for nothing, and given its value by [`MethodSpec::resolve`] where it counts.
pub trait MethodSpec {
    /// Refuses values that cannot be, by themselves or with advantages of this map.
    ///
    /// # Errors
    /// One line: key, value, remedy.
    fn check(&self, map: &AdvantageMap) -> Result<(), String>;

    /// Writes down the keys that were left out and count.
    fn resolve(&mut self) {}

    /// Its own map from rewards to advantages.
    fn map(&self) -> AdvantageMap;

    /// What a schedule of the old policy comes to.
    fn old_policy(&self, schedule: OldPolicySchedule) -> OldPolicyDecay {
        schedule.decay()
    }

    /// Its objective, for advantages of this map.
    fn objective(&self, map: &AdvantageMap) -> Box<dyn Objective>;
}

/// Refuses a map without a bound for a method, by its name, that takes advantages in units of it.
pub(super) fn bounded(method: &str, map: &AdvantageMap) -> Check {
    let key = if map.map == Map::Linear { "clip" } else { "map_clip" };
    match map.bound().is_finite() {
        true => Ok(()),
        false => Err(format!("advantage.{key} = inf: {method} divides by it; use a finite number, such as 5")),
    }
}
