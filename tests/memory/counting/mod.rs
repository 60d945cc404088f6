//! An allocator that counts what a program takes, for tests and benches of memory:
//!
//! ```text
//! #[global_allocator]
//! static ALLOCATOR: Counting<System> = Counting(System);
//! ```
#![allow(dead_code)] // not every program uses all of this

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Another allocator, how much of it is in use, and how often it was asked for more.
pub struct Counting<A>(pub A);

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

fn taken(bytes: usize) {
    let now = NOW.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(now, Relaxed);
    ALLOCATIONS.fetch_add(1, Relaxed);
}

fn given_back(bytes: usize) {
    NOW.fetch_sub(bytes, Relaxed);
}

// SAFETY: every call is passed on to the other allocator unchanged.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Counting<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: as the caller promised.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: as the caller promised.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        taken(size); // both may be there for a moment
        given_back(layout.size());
        // SAFETY: as the caller promised.
        unsafe { self.0.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        given_back(layout.size());
        // SAFETY: as the caller promised.
        unsafe { self.0.dealloc(pointer, layout) }
    }
}

/// Bytes in use.
pub fn now() -> usize {
    NOW.load(Relaxed)
}

/// Lets the peak begin anew; the bytes in use.
pub fn restart() -> usize {
    let now = now();
    PEAK.store(now, Relaxed);
    now
}

/// The most bytes in use since [`restart`].
pub fn peak() -> usize {
    PEAK.load(Relaxed)
}

/// Allocations so far.
pub fn allocations() -> usize {
    ALLOCATIONS.load(Relaxed)
}

/// Bytes in MiB.
pub fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
