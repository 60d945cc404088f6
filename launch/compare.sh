#!/usr/bin/env bash
# Trains the same base model with every method, from the same seeds, and sets them side by side: a table
# (comparison.md) and a picture (comparison.svg) of held-out reward against updates, images and seconds.
#
#   launch/compare.sh                     every method, seeds 1 2 3: about an hour and a quarter on 2 cores
#   launch/compare.sh ablation            FlowAWR and AdvantageFlow with one thing changed at a time: map, normaliser, lag
#   SEEDS="1 2" UPDATES=20 OUT=/scratch/c JOBS=16 launch/compare.sh
#
# A run is one process with one thread, JOBS of them at a time (default: the machine's cores): results do not depend on
# the number of ranks. A comparison that was interrupted goes on where it was. FLOWRL_BIN names another program.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

# One line a run: the name in the table, the configuration, what is set beside it.
methods() {
    cat <<'RUNS'
FlowAWR|flow-awr
AdvantageFlow(1-A)|advantage-flow-1-a
AdvantageFlow(1.1)|advantage-flow-1.1
DiffusionNFT(1)|diffusion-nft-1
DiffusionNFT(0.2)|diffusion-nft-0.2
DiffusionNFT(0.1)|diffusion-nft-0.1
AWM|awm
Flow-GRPO|flow-grpo
RUNS
}

ablation() {
    cat <<'RUNS'
FlowAWR|flow-awr
AdvantageFlow(1-A)|advantage-flow-1-a
FlowAWR, linear map|flow-awr|advantage.map=linear
FlowAWR, soft map|flow-awr|advantage.map=softmax
AdvantageFlow(1-A), within 5|advantage-flow-1-a|advantage.clip=5
FlowAWR, on policy|flow-awr|old_policy.rate=0.0
AdvantageFlow(1-A), on policy|advantage-flow-1-a|old_policy.rate=0.0
FlowAWR, pooled scale|flow-awr|advantage.normaliser=pooled-rms
AdvantageFlow(1-A), global scale|advantage-flow-1-a|advantage.normaliser=global-std
FlowAWR, robust form|flow-awr|method.variant=robust advantage.map=tempered-softmax advantage.normaliser=pooled-rms
RUNS
}

case ${1:-methods} in
    methods) runs=methods baseline='DiffusionNFT(1)' ;;
    ablation) runs=ablation baseline='AdvantageFlow(1-A)' ;;
    *)
        echo "usage: launch/compare.sh [methods|ablation]" >&2
        exit 2
        ;;
esac
out=${OUT:-runs/compare/$runs}

if [[ -z ${FLOWRL_BIN:-} ]]; then
    # shellcheck source=launch/setup.sh
    source launch/setup.sh
    cargo build --release
fi
export FLOWRL_BIN=${FLOWRL_BIN:-${CARGO_TARGET_DIR:-$root/target}/release/flowrl-dist}
export RAYON_NUM_THREADS=1

# train NAME|CONFIG|SETTINGS SEED OUT
train() {
    IFS='|' read -r name config settings <<<"$1"
    local folder="$3/${name//[^A-Za-z0-9.]/_}-$2" arguments=()
    if [[ -n ${UPDATES:-} ]]; then
        arguments+=(--set run.updates="$UPDATES")
    fi
    for setting in $settings; do
        arguments+=(--set "$setting")
    done
    mkdir -p "$folder"
    "$FLOWRL_BIN" --config "configs/glyphs/compare/$config.toml" --set run.name="\"$name\"" --set run.seed="$2" \
        "${arguments[@]}" --out "$folder" >"$folder/output.log" 2>&1 </dev/null || {
        echo "compare: $name, seed $2 failed; see $folder/output.log" >&2
        return 1
    }
    echo "$name, seed $2: $(tail -n 1 "$folder/output.log")"
}
export -f train

mkdir -p "$out"
for seed in ${SEEDS:-1 2 3}; do
    "$runs" | while IFS= read -r line; do printf '%s\0%s\0%s\0' "$line" "$seed" "$out"; done
done | xargs -0 -n 3 -P "${JOBS:-$(nproc)}" bash -c 'train "$@"' train

exec "$FLOWRL_BIN" report "$out"/*/ --out "$out" --baseline "$baseline"
