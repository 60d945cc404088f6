#!/usr/bin/env bash
# Proves a cluster in some minutes: two nodes, two updates, a restart, a signal. Tells what works and ends with 0 if all does.
#
#   sbatch slurm/smoke.sh                                                   the embedded task on CPUs
#   sbatch --gpus-per-node=2 slurm/smoke.sh --config configs/sd35/pickscore-flow-awr.toml
#
# The arguments are the program's. Submit it from the project's folder, or name that folder in FLOWRL_HOME (slurm/job.sh).
# It writes runs/smoke-JOB. Variables for modules, network, containers and launchers: docs/CLUSTER.md.
#SBATCH --job-name=flowrl-smoke
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --no-requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

home=${FLOWRL_HOME:-${SLURM_SUBMIT_DIR:-.}}
[[ -r $home/slurm/job.sh ]] || { echo "no slurm/job.sh in $home: submit from the project's folder or set FLOWRL_HOME" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source "$home/slurm/job.sh"

out=${submitted:?}/runs/smoke-$SLURM_JOB_ID
with_default --config "$home/configs/glyphs/flow-awr.toml" "$@"
if [[ $# == 0 ]]; then
    arguments+=(--set batch.prompts=4 --set batch.images_per_prompt=4 --set batch.micro_batch=4 --set eval.prompts=4)
fi
arguments+=(--out "$out" --set run.checkpoint_every=1 --set run.eval_every=0)

failed=0

# check WORDS CODE FOUND-CODE CONDITION...
check() {
    local words=$1 expected=$2 found=$3
    shift 3
    if ((found == expected)) && "$@" >/dev/null 2>&1; then
        say "ok      $words"
    else
        say "FAILED  $words (exit code $found, expected $expected; then: $*)"
        failed=1
    fi
}

updates_logged() { grep -q "^{\"update\":$1,.*\"iteration\"" "$out/metrics.jsonl"; }
# The next two are called by check.
# shellcheck disable=SC2317
inspect() { "${command[@]}" inspect "$out/checkpoints/update_$(printf %08d "$1")"; }
# shellcheck disable=SC2317
saved_by_signal() { compgen -G "$out/checkpoints/update_*" && ! updates_logged 1000; }

# Sends this shell the signal that Slurm sends before the time limit, when the run has begun.
signal_soon() {
    until updates_logged 4; do sleep 0.2; done
    kill -USR1 $$
}

code=0
ranks "${arguments[@]}" --set run.updates=2 || code=$?
check "$SLURM_NTASKS ranks on $SLURM_JOB_NUM_NODES nodes train two updates" 0 "$code" updates_logged 2
check "the checkpoint is whole" 0 "$code" inspect 2
code=0
ranks "${arguments[@]}" --set run.updates=3 || code=$?
check "a second start continues from it" 0 "$code" updates_logged 3
signal_soon 2>/dev/null &
code=0
ranks "${arguments[@]}" --set run.updates=1000 || code=$?
check "SIGUSR1 makes all ranks save and leave" 75 "$code" saved_by_signal
exit "$failed"
