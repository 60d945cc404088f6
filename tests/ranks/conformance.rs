//! The suite of all communicators, on one rank alone and on threads.

use flowrl_dist::comm::testing::conformance;
use flowrl_dist::comm::{Solo, ThreadGroup};

#[test]
fn solo_conforms() {
    conformance(&Solo).unwrap();
}

#[test]
fn threads_conform() {
    for ranks in [1, 2, 3, 4] {
        ThreadGroup::run(ranks, |world| {
            conformance(&*world.host)?;
            conformance(&*world.device)
        })
        .unwrap();
    }
}
