#!/usr/bin/env bash
# Kills a random rank of a run with SIGKILL at a random instant, again and again, and starts it again each time: the newest
# checkpoint must be whole and young after every kill, and the run must end as an unbroken one, to the bit.
#
#   launch/stress.sh            100 kills, about 15 minutes on 2 cores
#   launch/stress.sh 20
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
export FLOWRL_STRESS_KILLS=${1:-100}
exec cargo test --release --test training -- --nocapture stress
