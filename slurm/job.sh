#!/usr/bin/env bash
# Sourced by the batch scripts of this folder: runs the ranks of a job, and puts the job back into the queue where the program
# saved and wants to be started again. The settings are those of launch/supervise.sh, and
#
#   FLOWRL_LAUNCHER  srun (--mpi=pmix, default where Slurm has it), mpirun, or srun-tcp: srun without PMIx, ranks that meet
#                    over TCP, for GPUs
#   FLOWRL_RESTARTS  how often the job may go back into the queue; default 100
#
# In the arguments %j, %A and %a are the job, the array and the run of the array: sbatch --array=1-4 slurm/train_glyphs.sh
# --set run.seed=%a --out runs/seed-%a

restarts=${SLURM_RESTART_COUNT:-0}
# shellcheck disable=SC2034  # the log's lines have it
life="job ${SLURM_JOB_ID:?this script is for sbatch}${restarts:+, start $((restarts + 1))}"
# shellcheck source=launch/supervise.sh
source "${home:?}/launch/supervise.sh"
prepare "$home"

# expand ARGUMENT...: into the array `arguments`.
expand() {
    local argument
    arguments=()
    for argument in "$@"; do
        argument=${argument//%A/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
        argument=${argument//%a/${SLURM_ARRAY_TASK_ID:-0}}
        arguments+=("${argument//%j/$SLURM_JOB_ID}")
    done
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} && "$*" != *%[aj]* ]]; then
        refuse "the runs of an array would write into one folder: pass --out with %a in it"
    fi
}

# with_default --OPTION VALUE ARGUMENT...: adds the option to `arguments`, unless it is given.
with_default() {
    local option=$1 value=$2
    expand "${@:3}"
    if [[ " ${arguments[*]} " != *" $option"[\ =]* ]]; then
        arguments=("$option" "$value" "${arguments[@]}")
    fi
}

# Prints how this cluster starts ranks best.
choose_launcher() {
    if [[ -n ${FLOWRL_LAUNCHER:-} ]]; then
        echo "$FLOWRL_LAUNCHER"
    elif srun --mpi=list 2>&1 | grep -q pmix; then
        echo srun
    elif command -v mpirun >/dev/null; then
        echo mpirun
    else
        echo srun-tcp
    fi
}

# Ranks that meet over TCP must know a word that nobody else on the network does.
make_token() { FLOWRL_TOKEN=${FLOWRL_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}; export FLOWRL_TOKEN; }

# ranks ARGUMENT...: runs the program on all ranks of the job.
ranks() {
    # Ranks end each other, so that the exit code is their own; killing them at the first bad exit would hide it. One that
    # ended before it could join the others leaves them waiting: not longer than this.
    local -a flags=(--kill-on-bad-exit=0 --wait=60 --export=ALL)
    # Since Slurm 22.05 a step does not take over the job's processors for each rank by itself.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        flags+=(--cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores)
    fi
    # A rank sees all GPUs of its host, takes the one of its number there, and reaches its neighbours' directly.
    if [[ -n ${SLURM_JOB_GPUS:-${SLURM_GPUS_ON_NODE:-}} ]]; then
        flags+=(--gpu-bind=none)
    fi
    launcher=${launcher:-$(choose_launcher)}
    say "$SLURM_NTASKS ranks on $SLURM_JOB_NODELIST by $launcher: $program $*"
    case $launcher in
        srun) supervise srun --mpi=pmix "${flags[@]}" "${rank[@]}" "$@" ;;
        mpirun)
            mpirun_flags
            supervise mpirun -n "$SLURM_NTASKS" "${flags[@]}" "${rank[@]}" "$@"
            ;;
        srun-tcp)
            make_token
            supervise srun --mpi=none "${flags[@]}" "${rank[@]}" "$@"
            ;;
        *) refuse "FLOWRL_LAUNCHER is $launcher; it may be srun, mpirun or srun-tcp" ;;
    esac
}

is_cancelled() { scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null | grep -q 'JobState=CANCELLED'; }

# requeue: back into the queue. Not where SIGTERM came first or the job is cancelled: then somebody has decided otherwise.
requeue() {
    local limit=${FLOWRL_RESTARTS:-100}
    if [[ $stopping == TERM ]] || is_cancelled; then
        say "saved; Slurm ends this job itself"
    elif ((restarts >= limit)); then
        say "saved; not put back into the queue, because it was $restarts times (FLOWRL_RESTARTS)"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "saved; put back into the queue"
        # Slurm ends this script.
        sleep 60
    else
        say "saved; Slurm does not put this job back into the queue: submit it again"
    fi
}

# run_job ARGUMENT...: the whole job.
run_job() {
    local code=0
    ranks "$@" || code=$?
    case $code in
        0) say "done" ;;
        1 | 101) say "failed (exit code $code): see the messages above" ;;
        2) say "wrong usage or configuration: see the message above; the job is not started again" ;;
        75) requeue ;;
        *) say "given up after $tries starts" ;;
    esac
    exit "$code"
}
