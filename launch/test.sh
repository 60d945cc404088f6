#!/usr/bin/env bash
# Prepares the machine and tests everything that needs no GPU.
#
#   launch/test.sh           format, lints, documentation, all tests; built for CUDA and without MPI those that it makes a
#                            difference to, and what needs a GPU on an emulated one
#   launch/test.sh quick     format, lints, the library's tests
#
# A failing step does not stop the later ones; the summary at the end names it, and the exit code is 1. A step that
# cannot be done here ends with 77 and is named as skipped.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

# With job control a step is a process group of its own that an interrupt still ends; without, what runs in the
# background would ignore SIGINT, and so would the programs under test.
set -m

# What runs is built in target/. What is only checked needs of its dependencies no code but their types: they are read
# once, with every feature on, in the folder of check-cuda.sh. So lints and documentation check the CUDA code as well.

summary=()
failed=0
running=''

# step NAME LIMIT COMMAND...: runs the command, for LIMIT seconds at most.
step() {
    local name=$1 limit=$2 start=$SECONDS code=0 verdict=ok
    shift 2
    printf '\n=== %s: %s\n' "$name" "$*"
    timeout --kill-after=30 "$limit" "$@" </dev/null &
    running=$!
    wait "$running" || code=$?
    running=''
    if ((code != 0 && SECONDS - start >= limit)); then
        verdict="KILLED after $limit s"
        printf '\n!!!!!! %s did not end within %d s and was killed !!!!!!\n' "$name" "$limit"
    elif ((code == 77)); then
        verdict=SKIPPED
    elif ((code != 0)); then
        verdict="FAILED ($code)"
    fi
    if ((code != 0 && code != 77)); then
        failed=1
    fi
    summary+=("$(printf '%5d s  %-26s %s' $((SECONDS - start)) "$name" "$verdict")")
    printf '=== %s: %s, %d s\n' "$name" "$verdict" $((SECONDS - start))
}

# Called by the trap.
# shellcheck disable=SC2317
interrupted() {
    if [[ -n $running ]]; then
        kill "$running" 2>/dev/null || true
    fi
    exit 130
}

finish() {
    printf '\n=== Summary\n'
    printf '%s\n' "${summary[@]}"
    printf '%5d s  in all\n' "$SECONDS"
    exit "$failed"
}

# Lints and format are components that a minimal Rust leaves out.
need_component() {
    if ! cargo "$1" --version >/dev/null 2>&1 && ! rustup component add "$2"; then
        echo "test: cargo $1 is missing. Install it: rustup component add $2" >&2
        exit 2
    fi
}

# The harness that compares the methods, without the program.
comparison=(env -C benchmarks python3 -m unittest)

quick() {
    step 'format' 60 cargo fmt --check
    step 'comparison' 120 "${comparison[@]}"
    step 'lints' 1800 launch/check-cuda.sh clippy --all-targets -- -D warnings
    step 'library tests' 2400 cargo test --release --lib
}

everything() {
    step 'format' 60 cargo fmt --check
    step 'comparison' 120 "${comparison[@]}"
    if command -v shellcheck >/dev/null; then
        step 'scripts' 120 shellcheck -x launch/*.sh slurm/*.sh
    fi
    step 'supply chain' 300 launch/supply-chain.sh
    step 'lints' 1800 launch/check-cuda.sh clippy --all-targets -- -D warnings
    step 'documentation' 900 env RUSTDOCFLAGS='-D warnings' launch/check-cuda.sh doc --no-deps
    step 'lints without features' 900 cargo clippy --target-dir target/check --all-targets --no-default-features -- -D warnings
    # First: the next build takes over its dependencies.
    step 'build' 1800 cargo test --release --no-run
    step 'documents' 120 python3 launch/check-docs.py target/release/flowrl-dist
    step 'CUDA compiler' 600 bash -c 'command -v nvcc || launch/cuda-home.sh || exit 77'
    FLOWRL_NVCC=$(command -v nvcc || find target/cuda -path '*/bin/nvcc' -executable 2>/dev/null | head -n 1)
    export FLOWRL_NVCC=${FLOWRL_NVCC:+$(realpath "$FLOWRL_NVCC")}
    local alone=(--release --no-default-features)
    # What the feature makes a difference to.
    local groups=(--test program --test ranks --test cuda -- cli:: tcp:: mpi_launch:: gpu_fallback::)
    step 'build: CUDA, no MPI' 2400 launch/check-cuda.sh test "${alone[@]}" --lib "${groups[@]:0:6}" --no-run
    step 'kernels for GPUs' 300 launch/check-cuda.sh assemble
    step 'library: CUDA, no MPI' 600 launch/check-cuda.sh test "${alone[@]}" --lib
    step 'tests: CUDA, no MPI' 600 launch/check-cuda.sh test "${alone[@]}" --no-fail-fast "${groups[@]}"
    local gpu=(env FLOWRL_CARGO=launch/check-cuda.sh FLOWRL_WITHOUT_MPI=1 launch/gpu-check.sh)
    step 'build: GPU check' 1200 "${gpu[@]}" build target/gpu-check
    step 'emulated GPU' 1200 launch/emulate-gpu.sh "${gpu[@]}" run target/gpu-check
    step 'tests' 2700 cargo test --release --no-fail-fast
    step 'peers in Python' 1800 launch/check-export.sh
}

if (($# > 1)) || [[ ${1:-quick} != quick ]]; then
    echo "usage: launch/test.sh [quick]" >&2
    exit 2
fi
# shellcheck source=launch/setup.sh
source launch/setup.sh
need_component fmt rustfmt
need_component clippy clippy
trap interrupted INT TERM
if [[ ${1:-} == quick ]]; then
    quick
else
    everything
fi
finish
