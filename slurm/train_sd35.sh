#!/usr/bin/env bash
# Stable Diffusion 3.5 Medium on N nodes of 8 GPUs and 96 cores or more; what sbatch is given goes before the lines below.
#
#   sbatch slurm/train_sd35.sh
#   sbatch --nodes=4 slurm/train_sd35.sh --config my.toml --set run.seed=7 --out /scratch/me/run7
#   sbatch -A my-account -p gpu --nodes=2 --ntasks-per-node=4 --gpus-per-node=a100:4 --cpus-per-task=16 slurm/train_sd35.sh
#
# The last one is for nodes of 4 A100 and 64 cores: one rank a GPU, and all ranks together no more cores than the node has. A
# site may want GPUs as --gres=gpu:4, less memory than --mem=0, or no --exclusive (then delete the line).
#
# The arguments are the program's. Submit it from the project's folder, or name that folder in FLOWRL_HOME (slurm/job.sh).
# Variables for modules, network, containers and launchers: docs/CLUSTER.md.
#
# --signal=B:USR1@600: ten minutes before the time limit the ranks are asked to save and leave, which they do at the end of an
# iteration, and of the evaluation if one is due. So it must be longer than time.total + time.eval in metrics.jsonl, with a
# minute to spare for saving and for Slurm's clock: sbatch --signal=B:USR1@SECONDS. A job that runs into its limit is not put
# back into the queue; it goes on from its newest checkpoint when it is submitted again.
#SBATCH --job-name=flowrl-sd35
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
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
