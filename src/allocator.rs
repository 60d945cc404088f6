//! What the allocator of the program and its benches does with freed memory. The library leaves the choice of one to its
//! user.

use libmimalloc_sys::{mi_option_set_default, mi_option_t};

/// `mi_option_purge_delay` of mimalloc.h: the same number in its versions 2 and 3, and not a constant of the crate.
const PURGE_DELAY: mi_option_t = 15;

/// mimalloc keeps what is freed for the next allocation instead of giving it back to the kernel: a training step frees and
/// allocates the same gigabytes again and again, and each time the kernel clears their pages anew, a sixth of the whole
/// time. So the resident memory stays at its peak. Does nothing under another allocator, or where the environment has
/// `MIMALLOC_PURGE_DELAY`. To be called once, before other threads start.
pub fn keep_freed_memory() {
    // SAFETY: the function writes one number of a table that is there from the start of the process; it is not thread safe,
    // and no other thread is there to read it.
    unsafe { mi_option_set_default(PURGE_DELAY, -1) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libmimalloc_sys::mi_option_get;
    use std::process::Command;

    const VARIABLE: &str = "MIMALLOC_PURGE_DELAY";
    const EXPECTED: &str = "FLOWRL_TEST_PURGE_DELAYS";

    /// A process of the test below; alone it does nothing.
    #[test]
    fn keeps_freed_memory() {
        let Ok(expected) = std::env::var(EXPECTED) else { return };
        // SAFETY: as above; no other test has to do with these options.
        let delay = || unsafe { mi_option_get(PURGE_DELAY) };
        let before = delay();
        keep_freed_memory();
        assert_eq!(format!("{before} {}", delay()), expected);
    }

    /// Each in a process of its own: mimalloc reads the environment once.
    #[test]
    fn the_number_is_that_of_the_delay_and_the_environment_goes_before() {
        let delays = |expected: &str, variables: &[(&str, &str)]| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            for (name, _) in std::env::vars_os() {
                if name.to_string_lossy().to_lowercase().starts_with("mimalloc_") {
                    command.env_remove(name);
                }
            }
            command.args(["--exact", "allocator::tests::keeps_freed_memory"]);
            let output = command.env(EXPECTED, expected).envs(variables.iter().copied()).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("1 passed"), "{expected}: {said}");
        };
        delays("1000 -1", &[]); // mimalloc's own, in milliseconds
        delays("4321 4321", &[(VARIABLE, "4321")]);
    }
}
