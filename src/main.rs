//! The program: arguments to one call, errors to an exit code.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    std::process::exit(flowrl_dist::cli::run());
}
