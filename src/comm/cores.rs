//! How many threads a rank may use.

use super::launcher;

/// This rank's share of the host's cores, at least 1.
///
/// A launcher may have bound the rank to some cores (Open MPI does so by default, to one core or to a socket shared by
/// several ranks): the share is never more than that.
pub fn threads_per_rank() -> usize {
    let (online, bound, ranks) = cores();
    share(online, bound, ranks)
}

/// What to tell a user whose launcher bound the ranks to fewer cores than the host has for them.
pub fn binding_advice() -> Option<String> {
    let (online, bound, ranks) = cores();
    let fair = share(online, usize::MAX, ranks);
    (bound < fair).then(|| {
        format!(
            "each rank is bound to {bound} of the {fair} cores it could use: mpirun --bind-to none lets it use them"
        )
    })
}

/// Cores of the host, cores this process may run on, and ranks on the host.
fn cores() -> (usize, usize, usize) {
    let launcher = launcher::detect(&launcher::environment()).ok().flatten();
    let ranks = launcher.and_then(|launcher| launcher.local_ranks).unwrap_or(1);
    let bound = std::thread::available_parallelism().map_or(1, |n| n.get());
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok().and_then(|list| count(&list));
    (online.unwrap_or(bound), bound, ranks)
}

fn share(online: usize, bound: usize, ranks: usize) -> usize {
    (online / ranks.max(1)).clamp(1, bound.max(1))
}

/// Numbers in a list such as `0-3,8`.
fn count(list: &str) -> Option<usize> {
    list.trim().split(',').try_fold(0, |sum, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(sum + last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)? + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_gets_its_share_and_never_more_than_it_is_bound_to() {
        // (online, bound, ranks) -> threads
        for (case, threads) in [((2, 2, 1), 2), ((2, 1, 2), 1), ((2, 2, 8), 1), ((64, 32, 8), 8), ((64, 4, 2), 4)] {
            assert_eq!(share(case.0, case.1, case.2), threads, "{case:?}");
        }
    }

    #[test]
    fn lists_of_cores_are_counted() {
        assert_eq!(count("0-3,8\n"), Some(5));
        assert_eq!(count("0"), Some(1));
        assert_eq!(count("x"), None);
    }
}
