//! Where the ranks run: which host, and which of its ranks.

use super::launcher::Launcher;
use super::{Communicator, exchange};
use crate::error::{Error, Result};
use std::collections::BTreeSet;

/// Where this rank runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The name of the host.
    pub hostname: String,
    /// This rank among those of its host, `0..ranks_on_host`: the number of its GPU.
    pub local_rank: usize,
    /// Number of ranks on this host.
    pub ranks_on_host: usize,
    /// Number of hosts of the run.
    pub hosts: usize,
}

/// What a rank knows of its place before it asks the others.
#[derive(serde::Serialize, serde::Deserialize)]
struct Known {
    hostname: String,
    local_rank: Option<usize>,
    local_ranks: Option<usize>,
}

impl Place {
    /// Counts the ranks by host: by the launcher's word, because containers on different hosts may share a name; by names
    /// where a launcher tells nothing. Collective.
    ///
    /// # Errors
    /// [`Error::Usage`], the same on every rank, where the launcher's numbers do not fit the ranks that are there.
    pub(super) fn of(comm: &dyn Communicator, hostname: String, launcher: &Launcher) -> Result<Self> {
        let (local_rank, local_ranks) = (launcher.local_rank, launcher.local_ranks);
        let all = exchange(comm, &Known { hostname, local_rank, local_ranks })?;
        let mut places = Vec::with_capacity(all.len());
        for (rank, known) in all.iter().enumerate() {
            let same = |other: &&Known| other.hostname == known.hostname;
            let local_rank = known.local_rank.unwrap_or_else(|| all[..rank].iter().filter(same).count());
            let ranks_on_host = known.local_ranks.unwrap_or_else(|| all.iter().filter(same).count());
            if local_rank >= ranks_on_host {
                return Err(Error::Usage(format!(
                    "the launcher calls rank {rank} number {local_rank} of the {ranks_on_host} on {}: correct its number there \
                     (LOCAL_RANK of torchrun), or give hosts different names",
                    known.hostname
                )));
            }
            places.push((local_rank, ranks_on_host));
        }
        let hosts = match all.iter().map(|known| known.local_rank).collect::<Option<Vec<_>>>() {
            Some(local_ranks) => local_ranks.iter().filter(|&&local_rank| local_rank == 0).count(),
            None => all.iter().map(|known| &known.hostname).collect::<BTreeSet<_>>().len(),
        };
        let (local_rank, ranks_on_host) = places[comm.rank()];
        Ok(Self { hostname: all[comm.rank()].hostname.clone(), local_rank, ranks_on_host, hosts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::ThreadGroup;
    use crate::comm::launcher::Kind;

    /// Local rank, ranks on the host and hosts of every rank.
    fn places(names: [&str; 4], told: [(Option<usize>, Option<usize>); 4]) -> Result<Vec<(usize, usize, usize)>> {
        ThreadGroup::run(4, |world| {
            let rank = world.rank();
            let (local_rank, local_ranks) = told[rank];
            let launcher =
                Launcher { kind: Kind::Variables, name: "torchrun", rank, ranks: Some(4), local_rank, local_ranks };
            let place = Place::of(&*world.host, names[rank].into(), &launcher)?;
            Ok((place.local_rank, place.ranks_on_host, place.hosts))
        })
    }

    #[test]
    fn ranks_are_counted_by_host() {
        let untold = [(None, None); 4];
        assert_eq!(places(["a", "b", "a", "a"], untold).unwrap(), [(0, 3, 2), (0, 1, 2), (1, 3, 2), (2, 3, 2)]);
        let told = [0, 0, 1, 1].map(|rank| (Some(rank), Some(2)));
        assert_eq!(places(["c"; 4], told).unwrap(), [(0, 2, 2), (0, 2, 2), (1, 2, 2), (1, 2, 2)]);
        let beyond = [0, 1, 2, 5].map(|rank| (Some(rank), None));
        let refused = places(["a"; 4], beyond).unwrap_err();
        let words = "the launcher calls rank 3 number 5 of the 4 on a";
        assert!(matches!(&refused, Error::Usage(line) if line.starts_with(words)), "{refused}");
    }
}
