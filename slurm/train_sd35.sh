#!/usr/bin/env bash
# Stable Diffusion 3.5 Medium on N nodes of 8 GPUs.
#
#   sbatch slurm/train_sd35.sh
#   sbatch --nodes=4 slurm/train_sd35.sh --config my.toml --set run.seed=7 --out /scratch/me/run7
#
# The arguments are the program's. Submit it from the project's folder, or name that folder in FLOWRL_HOME.
#SBATCH --job-name=flowrl-sd35
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

home=${FLOWRL_HOME:-${SLURM_SUBMIT_DIR:-.}}
[[ -r $home/slurm/job.sh ]] || { echo "no slurm/job.sh in $home: submit from the project's folder or set FLOWRL_HOME" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source "$home/slurm/job.sh"

with_default --config "$home/configs/sd35/pickscore-flow-awr.toml" "$@"
run_job "${arguments[@]}"
