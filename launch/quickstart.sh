#!/usr/bin/env bash
# From a fresh clone to a training run: prepares the machine, builds the program, and starts it under mpirun on the
# embedded task, which needs no data, no weights and no GPU.
#
#   launch/quickstart.sh                             2 ranks
#   launch/quickstart.sh 4 --set run.updates=50      4 ranks; the rest goes to the program
#
# FLOWRL_BIN names another program to run; nothing is built then. The exit code is the program's.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
fi

# Cores this process may use, two threads of one core counted once, as MPI counts them.
usable_cores() {
    local threads cores
    threads=$(nproc)
    cores=$(lscpu -p=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l) || true
    echo $((cores > 0 && cores < threads ? cores : threads))
}

ranks=2
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    ranks=$1
    shift
fi
if ((ranks < 1)); then
    echo "quickstart: $ranks ranks; give at least 1" >&2
    exit 2
fi

if [[ -z ${FLOWRL_BIN:-} ]]; then
    # shellcheck source=launch/setup.sh
    source "$root/launch/setup.sh"
    cargo build --release --manifest-path "$root/Cargo.toml"
fi
program=${FLOWRL_BIN:-${CARGO_TARGET_DIR:-$root/target}/release/flowrl-dist}

launcher=$(command -v mpirun || command -v mpiexec) || {
    echo "quickstart: no mpirun and no mpiexec on the PATH (on a cluster, load the MPI module you built with)" >&2
    exit 2
}
cores=$(usable_cores)
flags=(-n "$ranks")
if "$launcher" --version 2>/dev/null | grep -i -e 'open.\?mpi' -e openrte >/dev/null; then
    # By default Open MPI ties a rank to one core, and the threads of the rank with it.
    flags+=(--bind-to none)
    if ((ranks > cores)); then
        flags+=(--oversubscribe)
    fi
    if ((EUID == 0)); then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
fi
export RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

exec "$launcher" "${flags[@]}" "$program" "$@"
