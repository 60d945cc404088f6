#!/usr/bin/env bash
# Compares with the real packages. diffusers and PEFT load each of our exports and give our velocities to 1e-4; a merged
# pipeline draws a picture with all its parts. torch, transformers and open_clip make the scores of the CLIP family anew, which
# ours must equal. Our server reads texts that Pillow drew no worse than rapidocr-onnxruntime does, and a run asks the reward
# server in Python. DiffusionNFT's iteration in PyTorch (launch/peers) gives the recorded values, and runs beside ours at a tiny
# size.
#
#   launch/check-export.sh [FOLDER]      FOLDER holds the Python environment; default: target/peers-venv
#
# The packages of tests/peers/requirements.txt come from the index that pip is configured for, 6 GB on disk, each file with
# the digest that tests/peers/requirements.lock has. Where no index is reached the check is skipped, says so, and ends with 77.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${1:-target/peers-venv}
requirements=tests/peers/requirements.lock

skip() {
    printf '\n!!!!!! check-export: SKIPPED, %s: nothing was compared with the real packages !!!!!!\n' "$1"
    exit 77
}

# The smallest of the packages, as the lock has it.
probe() { sed -n '/^six==/,/[^\\]$/p' "$requirements"; }

# Succeeds if the environment has just these packages already.
is_ready() {
    [[ -x $venv/bin/python ]] && cmp --silent "$requirements" "$venv/installed.txt"
}

if ! is_ready; then
    command -v python3 >/dev/null || skip 'there is no python3'
    python3 -m venv "$venv" || skip 'python3 has no module venv'
    # A small package first: whether there is an index at all.
    pip=("$venv/bin/pip" --disable-pip-version-check)
    "${pip[@]}" --retries 1 --timeout 15 download --quiet --no-cache-dir --no-deps --require-hashes --dest "$venv/probe" \
        --requirement <(probe) ||
        skip 'the package index cannot be reached'
    rm -r "$venv/probe"
    "${pip[@]}" install --quiet --no-cache-dir --require-hashes --requirement "$requirements"
    cp "$requirements" "$venv/installed.txt"
fi

# Writes target/tmp/exports.
cargo test --release --test parity files::peers
"$venv/bin/python" tests/peers/check_export.py target/tmp/exports
"$venv/bin/python" tests/peers/check_diffusion_nft.py

fixtures=target/tmp/peers
mkdir -p "$fixtures"
cp -r tests/fixtures/pickscore_micro "$fixtures"
"$venv/bin/python" tests/peers/make_clip_rewards.py "$fixtures"
FLOWRL_FIXTURES=$root/$fixtures cargo test --release --test parity reward_clip

launch/fetch-ocr.sh "$venv/ocr"
printf '[[reward]]\nname = "ocr"\ndetector = "%s"\n' "$(realpath "$venv/ocr/ch_PP-OCRv4_det_infer.onnx")" >"$fixtures/ocr.toml"
cargo build --release
PYTHON=$venv/bin/python launch/iteration.sh target/tmp/iteration tiny

server=''
trap '[[ -z $server ]] || kill "$server"' EXIT

# serve COMMAND...: starts a reward server at a port of its choice, which it tells on stderr; its address goes into `url`.
serve() {
    "$@" --listen 127.0.0.1:0 2>"$fixtures/server.log" &
    server=$!
    until url=$(grep --only-matching 'http://[0-9.:]*' "$fixtures/server.log"); do
        kill -0 "$server" 2>/dev/null || { cat "$fixtures/server.log"; exit 1; }
        sleep 0.2
    done
}

serve target/release/flowrl-dist serve-reward --config "$fixtures/ocr.toml"
"$venv/bin/python" tests/peers/check_ocr.py "$url"
kill "$server"
wait "$server" || true

# A run that asks the server in Python.
serve "$venv/bin/python" launch/peers/reward_server.py
target/release/flowrl-dist --set "reward=[{name=\"remote\", reward=\"example\", url=\"$url\"}]" --set batch.prompts=2 \
    --set batch.images_per_prompt=4 --set eval.prompts=4 --set run.updates=1 --resume never --out "$(mktemp -d "$fixtures/runXXX")"
