//! Whether what every rank holds is the same everywhere.

use super::Trainer;
use crate::comm::exchange;
use crate::error::{Error, Result};
use crate::shard::Sharding;

impl Trainer {
    /// Compares what must be the same on every rank: the policy and the old policy, and the
    /// optimizer's state where nothing is shared out. Where all is in parts no rank holds what
    /// another one does.
    ///
    /// # Errors
    /// The ranks that differ from rank 0: memory, a device or the network gave wrong numbers.
    pub(super) fn check_replicas(&self) -> Result<()> {
        if self.world.host.world_size() == 1 || self.state.sharding() == Sharding::Full {
            return Ok(());
        }
        let digests = exchange(&*self.world.host, &(self.policies.digest()?, self.state.digest()?))?;
        let what = match digests.iter().all(|(parameters, _)| *parameters == digests[0].0) {
            true => "masters, moments or EMA",
            false => "parameters",
        };
        let differing = (1..digests.len()).filter(|&rank| digests[rank] != digests[0]);
        let differing: Vec<String> = differing.map(|rank| rank.to_string()).collect();
        if differing.is_empty() {
            return Ok(());
        }
        Err(Error::Failed(format!(
            "update {}: the {what} of rank {} differ from rank 0's, which must be equal to the bit: a fault of memory, \
             device or network; start again with --resume auto, on other nodes if it comes back",
            self.state.update,
            differing.join(", ")
        )))
    }
}
