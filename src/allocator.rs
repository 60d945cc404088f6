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

    #[test]
    fn the_number_is_that_of_the_delay() {
        // SAFETY: as above; no other test has to do with these options.
        let before = unsafe { mi_option_get(PURGE_DELAY) };
        assert_eq!(before, 1000, "mimalloc's own delay in milliseconds");
        keep_freed_memory();
        // SAFETY: as above.
        assert_eq!(unsafe { mi_option_get(PURGE_DELAY) }, -1);
    }
}
