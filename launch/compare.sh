#!/usr/bin/env bash
# For one more release under its old name: the comparison of the methods is benchmarks/compare.py now.
#
#   launch/compare.sh                     tunes and runs the main table: five hours on 2 quiet cores
#   launch/compare.sh run bounds forms    any of compare.py's commands
set -euo pipefail
compare=$(dirname -- "${BASH_SOURCE[0]}")/../benchmarks/compare.py
if (($# == 0)); then
    "$compare" tune main
    set -- run main
fi
exec "$compare" "$@"
