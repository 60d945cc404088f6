//! The program: arguments to one call, errors to an exit code.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    flowrl_dist::allocator::keep_freed_memory();
    std::process::exit(flowrl_dist::cli::run());
}
