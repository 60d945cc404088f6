#!/usr/bin/env bash
# Reads our exports with the real packages: diffusers and PEFT load each of them and give our velocities to 1e-4.
#
#   launch/check-export.sh [FOLDER]      FOLDER holds the Python environment; default: target/peers-venv
#
# The packages of tests/peers/requirements.txt come from the index that pip is configured for, 6 GB on disk. Without a
# GPU PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu can make that less. Where no index is reached the check is
# skipped, says so, and ends with 77.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${1:-target/peers-venv}
requirements=tests/peers/requirements.txt

skip() {
    printf '\n!!!!!! check-export: SKIPPED, %s: nothing was read with diffusers and PEFT !!!!!!\n' "$1"
    exit 77
}

# Succeeds if the environment has just these packages already.
is_ready() {
    [[ -x $venv/bin/python ]] && cmp --silent "$requirements" "$venv/installed.txt"
}

if ! is_ready; then
    command -v python3 >/dev/null || skip 'there is no python3'
    python3 -m venv "$venv" || skip 'python3 has no module venv'
    # A small package first: whether there is an index at all.
    pip=("$venv/bin/pip" --disable-pip-version-check)
    "${pip[@]}" --retries 1 --timeout 15 download --quiet --no-cache-dir --no-deps --dest "$venv/probe" six ||
        skip 'the package index cannot be reached'
    rm -r "$venv/probe"
    "${pip[@]}" install --quiet --no-cache-dir --requirement "$requirements"
    cp "$requirements" "$venv/installed.txt"
fi

# Writes target/tmp/exports.
cargo test --release --test parity_files peers
"$venv/bin/python" tests/peers/check_export.py target/tmp/exports
