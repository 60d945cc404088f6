#!/usr/bin/env bash
# The embedded task on CPUs, on any number of nodes: proves a cluster, and is the script to try things on.
#
#   sbatch slurm/train_glyphs.sh
#   sbatch --nodes=4 slurm/train_glyphs.sh --config configs/glyphs/advantage-flow.toml --out runs/a
#   sbatch --array=1-3 slurm/train_glyphs.sh --set run.seed=%a --out runs/seed-%a
#
# The arguments are the program's. Submit it from the project's folder, or name that folder in FLOWRL_HOME (slurm/job.sh).
# Variables for modules, network, containers and launchers: docs/CLUSTER.md.
#SBATCH --job-name=flowrl-glyphs
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=2
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

home=${FLOWRL_HOME:-${SLURM_SUBMIT_DIR:-.}}
[[ -r $home/slurm/job.sh ]] || { echo "no slurm/job.sh in $home: submit from the project's folder or set FLOWRL_HOME" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source "$home/slurm/job.sh"

with_default --config "$home/configs/glyphs/flow-awr.toml" "$@"
run_job "${arguments[@]}"
