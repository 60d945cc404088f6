#!/usr/bin/env bash
# Sourced by the batch scripts of this folder: runs the ranks of a job, and puts the job back into the queue where the program
# saved and wants to be started again. The settings are those of launch/supervise.sh, and
#
#   FLOWRL_LAUNCHER    srun (default where Slurm has PMIx), mpirun, or srun-tcp: srun without MPI, ranks that meet over TCP,
#                      for GPUs
#   FLOWRL_MPI         what the MPI that the program was built with wants as srun --mpi=: pmix (Open MPI; default), pmi2 (Intel
#                      MPI, MPICH), cray_shasta (Cray MPICH); none is srun-tcp
#   FLOWRL_SRUN_FLAGS  further flags for srun: "--container-image=flowrl.sqsh --container-mounts=/scratch"
#   FLOWRL_RESTARTS    how often the job may go back into the queue; default 100
#   FLOWRL_HOME        the project's folder, where it is not the one that the job was submitted from. The job then works in it:
#                      run.out, model.prompt_cache and paths after --set are relative to it, those after --config, --out and
#                      --resume still to the folder that the job was submitted from.
#
# In the arguments %j, %A and %a are the job, the array and the run of the array: sbatch --array=1-4 slurm/train_glyphs.sh
# --set run.seed=%a --out runs/seed-%a

restarts=${SLURM_RESTART_COUNT:-0}
submitted=$PWD
# shellcheck disable=SC2034  # the log's lines have it
life="job ${SLURM_JOB_ID:?this script is for sbatch}${restarts:+, start $((restarts + 1))}"
# shellcheck source=launch/supervise.sh
source "${home:?}/launch/supervise.sh"
prepare "$home"
# After that, since what it writes belongs to the folder that the job was submitted from.
cd -- "${FLOWRL_HOME:-.}"

if [[ -z ${SLURM_NTASKS:-} && -n ${SLURM_NTASKS_PER_NODE:-} ]]; then
    SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))
fi
[[ -n ${SLURM_NTASKS:-} ]] || refuse "Slurm does not tell how many ranks there are: submit with --ntasks-per-node=N"

# with_default --OPTION VALUE ARGUMENT...: into the array `arguments`, with the option where it is not given, %j and the like
# replaced, and paths made absolute. An option is what the program takes for one, never a part of another's value.
with_default() {
    local default=("$1" "$2") option value given='' own=''
    shift 2
    arguments=()
    while (($# > 0)); do
        option=$1
        case $option in
            # "--option value" and "--option=value" alike.
            --config | --out | --resume | --set)
                (($# > 1)) || refuse "$option needs a value"
                value=$2
                shift 2
                ;;
            --config=* | --out=* | --resume=* | --set=*) value=${option#*=} option=${option%%=*} && shift ;;
            *) arguments+=("$(expand "$option")") && shift && continue ;;
        esac
        if [[ $option == "${default[0]}" ]]; then given=yes; fi
        # What tells the folders of an array's runs apart.
        case $option=$value in
            --out=*%[aj]* | --set=run.out=*%[aj]* | --config=*%[aj]*) own=yes ;;
        esac
        value=$(expand "$value")
        case $option=$value in
            --set=* | --resume=auto | --resume=never) ;;
            *) value=$(absolute "$value") ;;
        esac
        arguments+=("$option=$value")
    done
    if [[ -z $given ]]; then
        arguments=("${default[0]}=${default[1]}" "${arguments[@]}")
    fi
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} && -z $own ]]; then
        refuse "the runs of an array would write into one folder: pass --out with %a in it"
    fi
}

# expand WORD: prints it with the job, the array and the run of the array in it.
expand() {
    local word=${1//%A/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
    word=${word//%a/${SLURM_ARRAY_TASK_ID:-0}}
    printf %s "${word//%j/$SLURM_JOB_ID}"
}

absolute() { if [[ $1 == /* || -z $1 ]]; then printf %s "$1"; else printf %s "$submitted/$1"; fi; }

# Prints how this cluster starts ranks best.
choose_launcher() {
    if [[ -n ${FLOWRL_LAUNCHER:-} ]]; then
        echo "$FLOWRL_LAUNCHER"
    elif [[ ${FLOWRL_MPI:-} == none ]]; then
        echo srun-tcp
    elif [[ -n ${FLOWRL_MPI:-} ]]; then
        echo srun
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
    local -a own
    read -ra own <<<"${FLOWRL_SRUN_FLAGS:-}"
    flags+=("${own[@]}")
    launcher=${launcher:-$(choose_launcher)}
    say "$SLURM_NTASKS ranks on $SLURM_JOB_NODELIST by $launcher: ${command[*]} $*"
    case $launcher in
        srun) supervise srun --mpi="${FLOWRL_MPI:-pmix}" "${flags[@]}" "${rank[@]}" "$@" ;;
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
