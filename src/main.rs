//! The program: arguments to one call, errors to an exit code.

fn main() {
    std::process::exit(flowrl_dist::cli::run());
}
