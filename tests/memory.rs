//! What block-wise gradients save: peak heap above weights and gradients, beside one graph of the whole model.

mod blocks;

use blocks::{block_wise, inputs, monolithic, trained};
use flowrl_dist::Result;
use flowrl_dist::params::Trainable;
use std::alloc::{GlobalAlloc, Layout as Size, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, and how much of it is in use.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, size: Size) -> *mut u8 {
        let now = NOW.fetch_add(size.size(), Ordering::Relaxed) + size.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, size: Size) {
        NOW.fetch_sub(size.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// MiB at the peak of `work` above what was in use before.
fn peak(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    work()?;
    Ok((PEAK.load(Ordering::Relaxed) - before) as f64 / f64::from(1 << 20))
}

#[test]
fn activations_take_a_quarter_of_the_memory_block_by_block() -> Result<()> {
    let inputs = inputs()?;
    for trainable in [Trainable::Full, Trainable::Lora] {
        let (model, layout, params) = trained(trainable)?;
        let whole = peak(|| monolithic(&model, &params, &inputs))?;
        let [none, second, each] = [0, 2, 1].map(|n| peak(|| block_wise(&model, &params, &layout, &inputs, n)));
        let (none, second, each) = (none?, second?, each?);
        // Both hold the gradients of all trained parameters at the end.
        let gradients = (4 * layout.total) as f64 / f64::from(1 << 20);
        let ratio = (whole - gradients) / (each - gradients);
        eprintln!(
            "{trainable:?}: MiB above the weights, {gradients:.0} of them gradients: one graph {whole:.0}, block-wise without \
             checkpoints {none:.0}, each second block {second:.0}, each block {each:.0}; activations {ratio:.1} times less"
        );
        assert!(ratio >= 4.0, "{trainable:?}: {each} of {whole} MiB, {gradients} of gradients");
        assert!(each < second && second < none, "{trainable:?}: {each}, {second}, {none} MiB");
    }
    Ok(())
}
