#!/usr/bin/env bash
# An iteration of DiffusionNFT, ours beside PyTorch, which works in the order of DiffusionNFT's own program
# (launch/peers/diffusion_nft.py): Stable Diffusion 3.5 with random weights, LoRA, rollout, decode, a reward without a model, and
# training at 9 of 10 timesteps with distances from the old policy and from the base model.
#
#   launch/iteration.sh FOLDER [medium | tiny] [ours] [peer] [table]
#
# medium (the default): 36 images of 512 x 512 on a GPU, with what 512 images would take; 5 GB in FOLDER until it is done.
# tiny: 6 images of 64 x 64 on the CPU, to see that all of it runs; its figures mean nothing. The second of two iterations counts:
# in the first the old policy is the policy, and nothing is warm. FLOWRL_BIN names the program, PYTHON a Python with PyTorch.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
program=${FLOWRL_BIN:-$root/target/release/flowrl-dist}
python=${PYTHON:-python3}

usage() {
    echo 'usage: launch/iteration.sh FOLDER [medium | tiny] [ours] [peer] [table]' >&2
    exit 2
}

(($# > 0)) || usage
mkdir -p "$1"
folder=$(cd -- "$1" && pwd)
size=${2:-medium}
case $size in
    medium) device=cuda prompts=2 images=18 micro_batch=9 timesteps=9 resolution=512 t5_tokens=128 ;;
    tiny)
        device=cpu prompts=2 images=3 micro_batch=2 timesteps=2 resolution=64 t5_tokens=64
        export OMP_NUM_THREADS=1 # PyTorch's threads spin: beside other work they wait for each other for minutes
        ;;
    *) usage ;;
esac

# The program itself, in DiffusionNFT's setting. No block runs again going back: what the operations keep of 9 samples comes to
# 24 GB in bf16, added up from its shapes.
ours() {
    rm -rf "$folder"/{model,cache,run}
    "$program" random-model --size "$size" --out "$folder/model"
    cat >"$folder/config.toml" <<CONFIG
extends = "$root/configs/sd35/methods/diffusion-nft.toml"

[run]
name = "an iteration"
updates = 2
eval_every = 0
checkpoint_every = 0

[model]
path = "$folder/model"
prompt_cache = "$folder/cache"
resolution = $resolution
t5_tokens = $t5_tokens

[data]
train = "$root/configs/sd35/prompts/general.txt"
eval = "$root/configs/sd35/prompts/general-eval.txt"

[batch]
prompts = $prompts
images_per_prompt = $images
micro_batch = $micro_batch
timesteps = $timesteps

[eval]
steps = 1
prompts = 1

[[reward]]
name = "jpeg-compressibility"

[parallel]
device = "$device"
checkpoint_activations = 0
CONFIG
    "$program" --config "$folder/config.toml" --out "$folder/run"
    rm -rf "$folder"/{model,cache}
}

peer() {
    rm -f "$folder/peer.json"
    "$python" "$root/launch/peers/diffusion_nft.py" --size "$size" --device "$device" --prompts "$prompts" --images "$images" \
        --micro-batch "$micro_batch" --timesteps "$timesteps" --text $((77 + t5_tokens)) >"$folder/peer.part"
    mv "$folder/peer.part" "$folder/peer.json"
    cat "$folder/peer.json"
}

# Images a second, ours and PyTorch's.
table() {
    "$python" - "$folder" "$size" $((prompts * images)) "$resolution" <<'PYTHON'
import json, os, sys
folder, size, images, side = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
WHOLE = 512
PHASES = {
    "rollout": ["sample"],
    "decode and reward": ["decode", "reward"],
    "training": ["train", "reduce", "optimizer", "old_policy"],
    "iteration": ["total"],
}

def ours():
    lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    last = [line for line in lines if "time.total" in line][-1]
    seconds = {phase: sum(last[f"time.{name}"] for name in names) for phase, names in PHASES.items()}
    return seconds, last.get("memory.gpu_gb")

def theirs():
    if not os.path.exists(f"{folder}/peer.json"):
        return {}, None
    rows = json.load(open(f"{folder}/peer.json"))
    assert set(PHASES) == {row["phase"] for row in rows} and all(row["images"] == images for row in rows)
    return {row["phase"]: row["s"] for row in rows}, rows[-1]["gb"]

def line(name, values, unit=""):
    a, b, ratio = (f"{value:.2f}{unit if i < 2 else ''}" if value else "-" for i, value in enumerate(values))
    print(f"{name:<62} {a:>9} {b:>9} {ratio:>6}")

(own, memory), (peer, peer_memory) = ours(), theirs()
ratio = {phase: peer[phase] / own[phase] for phase in peer}
print(f"\n{f'An iteration of DiffusionNFT, {size}, {side} x {side}, LoRA: images/s':<62} {'ours':>9} {'PyTorch':>9} {'ratio':>6}")
for phase in PHASES:
    name = f"the whole iteration of {images} images" if phase == "iteration" else phase
    line(name, (images / own[phase], peer and images / peer[phase], ratio.get(phase)))
factor = WHOLE / images
whole = (factor * own["iteration"], peer and factor * peer["iteration"], ratio.get("iteration"))
line(f"{WHOLE} images, extrapolated from {images}", whole, " s")
line("memory of the GPU in use", (memory, peer_memory, None), " GB")
if peer and memory:
    good = lambda met: "met" if met else "MISSED"
    print(f"aims: twice as fast: {good(ratio['iteration'] >= 2)}; less than 60 GB: {good(memory < 60)}")
PYTHON
}

steps=("${@:3}")
((${#steps[@]} > 0)) || steps=(ours peer table)
for step in "${steps[@]}"; do
    case $step in
        ours | peer | table) "$step" ;;
        *) usage ;;
    esac
done
