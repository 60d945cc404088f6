#!/usr/bin/env bash
# Sourced by launch/mpirun.sh and slurm/job.sh: what every start of many ranks needs.
#
# Read from the environment (docs/CLUSTER.md has all variables):
#   FLOWRL_BIN      the program; default target/release/flowrl-dist of this checkout
#   FLOWRL_MODULES  modules to load first: "cuda/13.0 openmpi/5.0"
#   FLOWRL_WRAP     words before the program on every rank: "apptainer exec --nv flowrl.sif"
#   FLOWRL_TRIES    starts in a row that may fail to launch or lose a rank before the script gives up; default 3
#   FLOWRL_PAUSE    seconds before the second start, twice as many before the third, and so on; default 5
#   FLOWRL_NETWORK  the network interface the ranks talk over (ib0, eth1); default: the libraries choose
#   FLOWRL_ENV      further variables that mpirun passes on to other hosts: "REWARD_TOKEN HTTPS_PROXY"

tries=${FLOWRL_TRIES:-3}
# A start that held this long worked: earlier failures count no more.
readonly LONG_ENOUGH=600

say() { printf '%s flowrl-dist%s: %s\n' "$(date '+%F %T')" "${life:+ ($life)}" "$*"; }

refuse() {
    say "$*" >&2
    exit 2
}

# prepare HOME: modules, the program, the network.
prepare() {
    if [[ -n ${FLOWRL_MODULES:-} ]]; then
        command -v module >/dev/null || refuse "FLOWRL_MODULES is set, but there is no command module in this shell"
        local loaded=0
        # Sites' own scripts use unset variables and commands that fail.
        set +eu
        # shellcheck disable=SC2086  # several modules
        module load $FLOWRL_MODULES
        loaded=$?
        set -eu
        ((loaded == 0)) || refuse "module load $FLOWRL_MODULES failed (exit code $loaded): see module avail"
    fi
    program=${FLOWRL_BIN:-${CARGO_TARGET_DIR:-$1/target}/release/flowrl-dist}
    local -a wrap
    read -ra wrap <<<"${FLOWRL_WRAP:-}"
    # In a container the program's path is the container's.
    if [[ ${#wrap[@]} == 0 && ${FLOWRL_SRUN_FLAGS:-} != *--container-image* ]]; then
        [[ -x $program ]] || refuse "no program at $program: build it with cargo build --release, or name it in FLOWRL_BIN"
        program=$(realpath --no-symlinks -- "$program")
    fi
    command=("${wrap[@]}" "$program")
    # A file that is there when the ranks were, and in which one that ends the job leaves the exit code. In the working folder,
    # which the hosts share.
    local folder=$PWD
    [[ -w $folder ]] || folder=${TMPDIR:-/tmp}
    export FLOWRL_MARK=$folder/.flowrl-${SLURM_JOB_ID:-$(hostname -s)}-$$
    # shellcheck disable=SC2016,SC2034  # expanded by the ranks; used by those who source this
    rank=(bash -c ': >>"$0"; exec "$@"' "$FLOWRL_MARK" "${command[@]}")
    trap 'rm -f "$FLOWRL_MARK"' EXIT

    # Say what went wrong and nothing else; INFO shows rings and transports.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # InfiniBand: 4 us * 2^22, 17 s, until a packet counts as lost; the default gives up when a switch is reconfigured.
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
    # InfiniBand: a lost packet is sent this often before the job ends; 7 is the most the hardware knows.
    export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7}
    if [[ -n ${FLOWRL_NETWORK:-} ]]; then
        # The interface for NCCL's start, and for its data where there is no InfiniBand.
        export NCCL_SOCKET_IFNAME=$FLOWRL_NETWORK
        # The same for Open MPI's data and for its control connections, which are PRRTE's from Open MPI 5 on.
        export OMPI_MCA_btl_tcp_if_include=$FLOWRL_NETWORK OMPI_MCA_oob_tcp_if_include=$FLOWRL_NETWORK
        export PRTE_MCA_prte_if_include=$FLOWRL_NETWORK
        # UCX knows an InfiniBand or RoCE interface's adapter by another name: mlx5_0 beside ib0.
        local adapter
        adapter=$(compgen -G "/sys/class/net/$FLOWRL_NETWORK/device/infiniband/*" | sed -n 1p) || true
        export UCX_NET_DEVICES=${UCX_NET_DEVICES:-$FLOWRL_NETWORK${adapter:+,${adapter##*/}:1}}
    else
        # Not over loopback nor the bridges of container engines: they lead nowhere.
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,virbr,podman}
    fi
    # Open MPI's control connections notice a dead host or cable after 3 + 3 * 1 s; its default is 8 minutes.
    export OMPI_MCA_oob_tcp_keepalive_time=3 OMPI_MCA_oob_tcp_keepalive_intvl=1 OMPI_MCA_oob_tcp_keepalive_probes=3
    export PRTE_MCA_oob_tcp_keepalive_time=3 PRTE_MCA_oob_tcp_keepalive_intvl=1 PRTE_MCA_oob_tcp_keepalive_probes=3
    if ((EUID == 0)); then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
}

# Whether mpirun is Open MPI's.
is_open_mpi() { mpirun --version 2>/dev/null | grep -q -i -e 'open.\?mpi' -e openrte; }

# Prints the names of the variables that ranks on other hosts get from this shell. Not CUDA_VISIBLE_DEVICES, which is this
# host's own, and of FLOWRL_ENV those that are set.
passed_on() {
    local name names=${FLOWRL_ENV:-}
    compgen -e | grep -E '^((NCCL|UCX|CUDA|FLOWRL|RAYON|RUST)_.*|PATH|LD_LIBRARY_PATH)$' | grep -vx CUDA_VISIBLE_DEVICES
    for name in ${names//,/ }; do
        if printenv "$name" >/dev/null; then echo "$name"; fi
    done
}

# Puts the flags of this machine's mpirun into the array `flags`.
mpirun_flags() {
    local name
    flags=()
    if is_open_mpi; then
        # A rank uses as many threads as the host has cores for it: by default it would be tied to one core.
        flags+=(--bind-to none)
        while IFS= read -r name; do flags+=(-x "$name"); done < <(passed_on | sort -u)
    fi
    read -ra name <<<"${FLOWRL_MPIRUN_FLAGS:-}"
    flags+=("${name[@]}")
}

running='' stopping=''

# Signals come to this shell, and the launcher gives them to the ranks: SIGUSR1 always, because launchers kill ranks soon
# after a SIGTERM.
pass_on() {
    # The first one is the reason.
    stopping=${stopping:-$1}
    if [[ -n $running ]]; then
        say "SIG$1: the ranks are asked to save and leave"
        kill -s USR1 "$running" 2>/dev/null || true
    fi
}

# Waits for the launcher, however many signals come meanwhile; returns its exit code.
await() {
    local code again=127
    wait "$running" && code=0 || code=$?
    while kill -0 "$running" 2>/dev/null; do
        wait "$running" && code=0 || code=$?
    done
    # A signal may have ended the last wait, not the launcher.
    wait "$running" && again=0 || again=$?
    ((again == 127)) || code=$again
    running=''
    return "$code"
}

# Ends a launcher that outlives its ranks: mpirun waits for ever for a host that is frozen.
end_with_ranks() {
    while kill -0 "$1" 2>/dev/null; do
        if [[ -s $FLOWRL_MARK ]]; then
            sleep 2
            kill -s KILL "$1" 2>/dev/null && say "the ranks ended the job with exit code $(<"$FLOWRL_MARK"), but the launcher did not end"
            return
        fi
        sleep 0.5
    done
}

# supervise COMMAND...: runs a launcher, again where the ranks were not launched or one was lost. Returns 0, 1, 2 or 101, the
# program's own words, 75 where it wants to be started again (which is done here if `again_at_75` is set and no signal asked
# to leave), or whatever the launcher's last failure was.
supervise() {
    local code failures=0 start
    while [[ -z $stopping ]]; do
        start=$SECONDS
        rm -f "$FLOWRL_MARK"
        "$@" &
        running=$!
        end_with_ranks "$running" &
        await && code=0 || code=$?
        if [[ -s $FLOWRL_MARK ]]; then code=$(<"$FLOWRL_MARK"); fi
        case $code in
            0 | 2 | 101) return "$code" ;;
            1) if [[ -e $FLOWRL_MARK ]]; then return 1; fi ;; # launchers that cannot start the ranks say 1 as well
            75) if [[ -n $stopping || -z ${again_at_75:-} ]]; then return 75; fi ;;
        esac
        ((SECONDS - start < LONG_ENOUGH)) || failures=0
        failures=$((failures + 1))
        [[ -z $stopping ]] || break
        say "the launcher ended with exit code $code: a rank was lost, or was never there (failure $failures of $tries)"
        if ((failures >= tries)); then
            return "$code"
        fi
        sleep $((failures * ${FLOWRL_PAUSE:-5})) || true
    done
    # Asked to leave while no rank ran, or before it could: nothing is lost.
    return 75
}

trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on HUP' HUP
