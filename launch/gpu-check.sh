#!/usr/bin/env bash
# Everything that needs a GPU: right results, ranks on NCCL, and speed beside PyTorch. One GPU is enough.
#
#   launch/gpu-check.sh                   builds (docs/INSTALL.md: the toolkit), then checks: under 8 minutes
#   launch/gpu-check.sh build FOLDER      builds only, and lays stripped programs and fixtures down in FOLDER ...
#   launch/gpu-check.sh run FOLDER        ... for a machine with a GPU and no toolkit, or no Rust
#
# It builds with MPI where mpirun is installed and FLOWRL_WITHOUT_MPI is not set: a program with MPI does not start where its
# library is missing. PyTorch is compared with where `python3 -c 'import torch'` works.
#
# Without a GPU and a toolkit, up to where speed begins:
#
#   FLOWRL_CARGO=launch/check-cuda.sh launch/gpu-check.sh build FOLDER
#   launch/emulate-gpu.sh launch/gpu-check.sh run FOLDER
#
# Exit code: 0 all is well; 1 something is not; 3 there is no GPU, and what needs none is well.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
tests=(cuda)

usage() {
    echo 'usage: launch/gpu-check.sh [build FOLDER | run FOLDER]' >&2
    exit 2
}

# The executables of `cargo ... --message-format=json`, as "name path".
executables() {
    python3 -c '
import json, sys
for line in sys.stdin:
    try:
        message = json.loads(line)
    except ValueError:
        continue
    if message.get("executable"):
        print(message["target"]["name"], message["executable"])'
}

build() {
    local folder=$1 features=(--features cuda) arguments=() name
    if [[ -n ${FLOWRL_WITHOUT_MPI:-} ]] || ! command -v mpirun >/dev/null; then
        features+=(--no-default-features)
    fi
    for name in "${tests[@]}"; do arguments+=(--test "$name"); done
    mkdir -p "$folder"
    (
        cd "$root"
        local cargo=${FLOWRL_CARGO:-cargo} common=("${features[@]}" --message-format=json)
        "$cargo" test --release "${common[@]}" --no-run "${arguments[@]}"
        "$cargo" build --release "${common[@]}" --bin flowrl-dist
        "$cargo" bench "${common[@]}" --no-run --bench gpu
    ) | executables | while read -r name path; do
        strip -o "$folder/$name" "$path"
    done
    [[ -x $folder/flowrl-dist && -x $folder/gpu && -x $folder/cuda ]] || { echo 'gpu-check: the build failed' >&2; exit 1; }
    rm -rf "$folder/fixtures"
    cp -r "$root/tests/fixtures" "$folder/fixtures"
}

summary=()
failed=0

# step NAME LIMIT COMMAND...: runs the command, for LIMIT seconds at most; what it prints goes to LOG/NAME as well.
step() {
    local name=$1 limit=$2 start=$SECONDS code=0 verdict=ok
    shift 2
    printf '\n=== %s\n' "$name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 </dev/null | tee "$log/${name// /-}" || code=$?
    if ((code != 0)); then
        verdict="FAILED ($code)"
        failed=1
    fi
    summary+=("$(printf '%5d s  %-44s %s' $((SECONDS - start)) "$name" "$verdict")")
}

skip() {
    summary+=("$(printf '    - s  %-44s skipped: %s' "$1" "$2")")
}

# The embedded task on the GPU, `ranks` ranks: two optimizer updates. A rank that fails ends the others.
# shellcheck disable=SC2317 # called by same_run
train() {
    local ranks=$1 out=$2 port=$((20000 + RANDOM % 9000))
    local command=("$folder/flowrl-dist" --out "$out")
    local settings=(parallel.device=cuda parallel.deadline_s=60 run.updates=2 run.eval_every=2 run.checkpoint_every=0 batch.prompts=3)
    if [[ -z ${EMULATED_GPU:-} ]]; then
        settings+=(batch.images_per_prompt=5 batch.micro_batch=4 batch.timesteps=2 sampler.steps=4 eval.steps=4 eval.prompts=5)
    else
        settings+=(batch.images_per_prompt=2 batch.micro_batch=2 batch.timesteps=1 sampler.steps=2 eval.steps=2 eval.prompts=2)
    fi
    local setting
    for setting in "${settings[@]}"; do command+=(--set "$setting"); done
    if ((ranks == 1)); then
        "${command[@]}"
        return
    fi
    local rank processes=()
    for ((rank = 0; rank < ranks; rank++)); do
        RANK=$rank WORLD_SIZE=$ranks LOCAL_RANK=$rank LOCAL_WORLD_SIZE=$ranks MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
            FLOWRL_TOKEN=gpu-check NCCL_HOSTID=rank-$rank "${command[@]}" --set parallel.backend=tcp &
        processes+=($!)
    done
    # shellcheck disable=SC2064 # those of now
    trap "kill ${processes[*]} 2>/dev/null || true" EXIT
    local process
    for process in "${processes[@]}"; do wait "$process"; done
}

# The same run on 1 and 2 ranks, within the order of sums.
# shellcheck disable=SC2317 # called by bash
same_run() {
    train 1 "$log/one"
    train 2 "$log/two"
    python3 - "$log/one/metrics.jsonl" "$log/two/metrics.jsonl" <<'PYTHON'
import json, sys
one, two = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
assert len(one) == len(two) and one, "different numbers of lines"
worst = 0.0
for a, b in zip(one, two):
    for name in a:
        if name.startswith(("time", "sent", "memory")) or not isinstance(a[name], float):
            continue
        off = abs(a[name] - b[name])
        relative = off / max(abs(a[name]), abs(b[name]), 1e-12)
        assert relative < 1e-4 or off < 1e-6, f"{name} of update {a['update']}: {a[name]} and {b[name]}"
        worst = max(worst, min(relative, off))
print(f"1 and 2 ranks are the same run: metrics differ by {worst:.1e} at most")
PYTHON
}

# Our figures beside PyTorch's, as ratios.
table() {
    python3 - "$log/speed" "$log/speed-of-PyTorch" <<'PYTHON'
import json, os, sys
def rows(path):
    lines = [line for line in open(path) if line.startswith("[{")] if os.path.exists(path) else []
    return {row["phase"]: row for row in json.loads(lines[-1])} if lines else {}
ours, theirs = map(rows, sys.argv[1:])
if ours:
    print(f"\n{'Stable Diffusion 3.5 Medium, 512 x 512, bf16':<62} {'ours':>9} {'PyTorch':>9} {'ratio':>6}   memory")
for phase, row in ours.items():
    peer = theirs.get(phase)
    other = f"{peer['rate']:9.2f} {row['rate'] / peer['rate']:6.2f}" if peer else f"{'-':>9} {'-':>6}"
    memory = f"{row['gb']:5.1f} GB" + (f" against {peer['gb']:.1f} GB" if peer else "")
    print(f"{phase:<62} {row['rate']:9.2f} {other}   {memory}")
PYTHON
}

finish() {
    printf '\n=== Summary\n'
    printf '%s\n' "${summary[@]}"
    printf '%5d s  in all\n' "$SECONDS"
}

check() {
    # Where no module has brought the libraries, PyTorch may have.
    eval "$("$root/launch/cuda-home.sh" --libraries 2>/dev/null || true)"
    export FLOWRL_FIXTURES=$folder/fixtures FLOWRL_SHARE_GPU=1 FLOWRL_BIN=$folder/flowrl-dist
    # Several ranks on one GPU talk over the loopback.
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} NCCL_NET=Socket NCCL_IB_DISABLE=1 NCCL_MNNVL_ENABLE=0
    local slowness=1
    [[ -z ${EMULATED_GPU:-} ]] || slowness=4
    if [[ $mode == all ]]; then
        # They want the sources and a compiler.
        step 'kernels on the CPU' 120 "$folder/cuda" cuda_kernels::
        step 'what a missing GPU leads to' 60 "$folder/cuda" gpu_fallback::
    fi
    local state
    state=$("$folder/cuda" cuda_ops::time_features --exact --nocapture 2>&1 || true)
    if [[ $state == *'SKIPPED, NOTHING WAS TESTED'* ]]; then
        finish
        printf '\nNO GPU, so nothing was tested on one: %s\n' "$(grep -o 'SKIPPED.*' <<<"$state" | head -n 1 | cut -d: -f2-)"
        ((failed == 0)) && exit 3 || exit 1
    fi
    step 'operations and transformer' $((150 * slowness)) "$folder/cuda" cuda_ops:: --nocapture --test-threads=1
    step 'NCCL' 150 "$folder/cuda" nccl:: --nocapture --test-threads=1
    step 'the same run on 1 and 2 ranks' $((120 * slowness)) bash -ec same_run
    if [[ -n ${EMULATED_GPU:-} ]]; then
        # No GPU seen so far has needed these.
        step 'the ways round cuBLASLt' 300 env EMULATED_GPU_PLAIN_PRODUCTS=1 "$folder/cuda" --nocapture cuda_ops::linear cuda_ops::low_rank transformer
        step 'NCCL beside late streams' 150 env EMULATED_GPU_DELAY=300 "$folder/cuda" --nocapture --test-threads=1 nccl_conforms
        finish
        exit "$failed"
    fi
    step 'speed' 150 "$folder/gpu"
    step 'a whole iteration' 240 "$root/launch/iteration.sh" "$log/iteration" medium ours
    if python3 -c 'import torch' 2>/dev/null; then
        step 'speed of PyTorch' 150 python3 "$root/launch/peers/sd35.py"
        step 'a whole iteration of PyTorch' 150 "$root/launch/iteration.sh" "$log/iteration" medium peer
    else
        skip 'speed and a whole iteration of PyTorch' 'there is no torch'
    fi
    finish
    table || failed=1
    if [[ -e $log/iteration/run/metrics.jsonl ]]; then
        "$root/launch/iteration.sh" "$log/iteration" medium table || failed=1
    fi
    exit "$failed"
}

mode=${1:-all}
case $mode in
    build | run)
        (($# == 2)) || usage
        mkdir -p "$2"
        folder=$(cd -- "$2" && pwd)
        ;;
    all) folder=$root/target/gpu-check ;;
    *) usage ;;
esac
if [[ $mode != run ]]; then
    build "$folder"
fi
if [[ $mode == build ]]; then
    exit
fi
log=$(mktemp -d)
export -f train same_run table
export folder log
check
