//! The suite of all communicators on real MPI: this program starts itself again as the ranks.

use crate::common::{ROLE, workers};
use flowrl_dist::Result;
use flowrl_dist::comm::testing::conformance;
use flowrl_dist::comm::{Backend, Launch, MpiSession, World};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(120);
const DEADLINE: Duration = Duration::from_secs(60);

/// One rank; does nothing in the run of the tests themselves.
#[test]
fn worker() {
    match std::env::var(ROLE).as_deref() {
        Ok("whole") => whole().unwrap(),
        Ok("chunked") => chunked().unwrap(),
        _ => (),
    }
}

/// As the program does it.
fn whole() -> Result<()> {
    let world = World::from_environment(&Launch::new(Backend::Auto, DEADLINE))?;
    conformance(&*world.host)?;
    conformance(&*world.device)?;
    assert_eq!((world.place().local_rank, world.place().ranks_on_host), (world.rank(), world.world_size()));
    if world.rank() == 0 {
        println!("WORLD {}", world.describe());
    }
    Ok(())
}

/// With limits on the elements of a call far below the lengths of the suite.
fn chunked() -> Result<()> {
    let (_session, comm) = MpiSession::begin(DEADLINE)?;
    for elements in [1, 5, 8, 1000] {
        conformance(&comm.with_chunk(elements))?;
    }
    Ok(())
}

#[test]
fn mpi_conforms_on_1_2_and_4_ranks() {
    for (ranks, words) in [(1, "1 rank on 1 host"), (2, "2 ranks on 1 host"), (4, "4 ranks on 1 host")] {
        let output = workers(module_path!(), ranks, "whole", TIMEOUT).success();
        assert!(output.stdout.contains(&format!("WORLD {words} over MPI (")), "{output}");
    }
}

#[test]
fn mpi_conforms_in_chunks() {
    for ranks in [1, 2, 3] {
        workers(module_path!(), ranks, "chunked", TIMEOUT).success();
    }
}
