#!/usr/bin/env bash
# A real Slurm cluster on this machine, for tests: munge, slurmctld on a virtual host "head", and slurmd on virtual hosts
# n1, n2, ... (launch/hosts-local.sh). Nothing outside its own folder is touched, no service of the system is started.
#
#   launch/slurm-local.sh up [NODES [CPUS]]   start it; 2 nodes of 4 processors. Missing packages are installed (Debian)
#   launch/slurm-local.sh exec COMMAND...     a command with the cluster's settings: exec sbatch slurm/smoke.sh
#   launch/slurm-local.sh status              what runs
#   launch/slurm-local.sh kill-node NODE      power off a node in the middle of its work;  start-node NODE  boots it again
#   launch/slurm-local.sh cut-node|heal-node|freeze-node|thaw-node NODE    its cable; its processes
#   launch/slurm-local.sh down                end everything
#
# Partitions: main; low, whose jobs are sent away (SIGTERM, 20 s, back to the queue) for jobs of high. Memory is not
# counted. A node that does not answer for 10 s is down. FLOWRL_SLURM is the folder of the state, default
# /tmp/flowrl-slurm; where FLOWRL_OWNER is the number of a process, the cluster ends with that process.
# Exit codes: 1 failed, 2 wrong usage, 3 privileges or packages are missing.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
state=${FLOWRL_SLURM:-/tmp/flowrl-slurm}
export FLOWRL_HOSTS=$state/hosts SLURM_CONF=$state/slurm.conf
socket=$state/munge.socket
PATH=$PATH:/usr/sbin:/sbin

hosts() { "$here/hosts-local.sh" "$@"; }

fail() {
    local code=$1
    shift
    printf 'slurm-local: %s\n' "$*" >&2
    exit "$code"
}

# wait_until SECONDS COMMAND...
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.2
    done
}

install_packages() {
    local -a missing=()
    local package
    command -v munged >/dev/null || missing+=(munge)
    for package in slurmctld slurmd; do
        command -v "$package" >/dev/null || missing+=("$package")
    done
    command -v sbatch >/dev/null || missing+=(slurm-client)
    # The PMIx plugin.
    compgen -G '/usr/lib/*/slurm-wlm/mpi_pmix*.so' >/dev/null || missing+=(slurm-wlm-basic-plugins)
    command -v ip >/dev/null || missing+=(iproute2)
    ((${#missing[@]} > 0)) || return 0
    command -v apt-get >/dev/null || fail 3 "missing: ${missing[*]}, and there is no apt here"
    ((EUID == 0)) || fail 3 "missing: ${missing[*]}, and installing them needs root"
    # Their services must not start: without a policy of the machine, a policy of our own for this moment.
    local policy=/usr/sbin/policy-rc.d made=''
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        made=1
    fi
    local code=0
    {
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -q -y --no-install-recommends "${missing[@]}"
    } >"$state/apt.log" 2>&1 || code=$?
    if [[ $made ]]; then
        rm -f "$policy"
    fi
    ((code == 0)) || fail 1 "apt-get could not install ${missing[*]}; see $state/apt.log"
    echo "slurm-local: installed ${missing[*]}"
}

# write_configuration NODES CPUS
write_configuration() {
    local node
    cat >"$SLURM_CONF" <<CONF
ClusterName=flowrl-local
SlurmctldHost=head($(hosts address head))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that was put back into the queue may start again when its old credentials have expired.
AuthInfo=cred_expire=10,socket=$socket
StateSaveLocation=$state/controller
SlurmdSpoolDir=$state/spool/%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
# PMIx keeps files there under names that nodes with one file system would share.
TmpFS=$state/tmp/%n
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
    for node in "${@:3}"; do
        echo "NodeName=$node NodeAddr=$(hosts address "$node") CPUs=$2 State=UNKNOWN"
    done >>"$SLURM_CONF"
    cat >>"$SLURM_CONF" <<'CONF'
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=20 PreemptMode=OFF
CONF
    echo 'CgroupAutomount=no' >"$state/cgroup.conf"
}

# --- daemons ----------------------------------------------------------------------------------------------------
# munged is reached by a socket in the file system, so one on "head" serves all nodes.

start_daemon() { # HOST COMMAND...
    local host=$1 log=$state/$2-$1.out
    shift
    setsid "$here/hosts-local.sh" on "$host" "$@" </dev/null >>"$log" 2>&1 &
}

start_munge() {
    (umask 077 && head -c 128 /dev/urandom >"$state/munge.key")
    chown root:root "$state" "$state/munge.key"
    rm -f "$socket"*
    start_daemon head munged --foreground --force --key-file="$state/munge.key" --socket="$socket" \
        --pid-file="$state/munged.pid" --seed-file="$state/munge.seed" --log-file="$state/munged.log"
    wait_until 10 test -S "$socket" || fail 1 "munged does not start: $(tail -3 "$state/munged-head.out")"
}

start_slurmd() {
    # A crash leaves what a reboot would clear.
    rm -rf "$state/tmp/$1" "$state/spool/$1"
    mkdir -p "$state/spool/$1"
    mkdir -p "$state/tmp/$1"
    chmod 1777 "$state/tmp/$1"
    start_daemon "$1" slurmd -D -N "$1"
}

ready() { [[ $(sinfo -h -p main -N -t idle,mixed,allocated -o %N | wc -l) == "$1" ]]; }

up() {
    local count=${1:-2} cpus=${2:-4} node
    [[ $count =~ ^[1-9][0-9]?$ && $cpus =~ ^[1-9][0-9]?$ ]] || fail 2 "up [NODES [CPUS]]: numbers from 1 to 99"
    local -a nodes=()
    for ((i = 1; i <= count; i++)); do nodes+=("n$i"); done
    if [[ -e $SLURM_CONF ]] && [[ "$(cat "$state/layout" 2>/dev/null)" == "$count $cpus" ]] && scontrol ping >/dev/null 2>&1; then
        ready "$count" && return
    fi
    ((EUID == 0)) || fail 3 "the cluster needs root"
    down
    mkdir -p "$state"
    [[ -z $(ls -A "$state") ]] || fail 2 "$state holds files of others; name a new folder in FLOWRL_SLURM"
    chmod 755 "$state"
    touch "$state/flowrl-slurm-local"
    install_packages
    hosts up head "${nodes[@]}"
    mkdir -p "$state/controller"
    write_configuration "$count" "$cpus" "${nodes[@]}"
    echo "$count $cpus" >"$state/layout"
    start_munge
    start_daemon head slurmctld -D
    wait_until 20 scontrol ping || fail 1 "slurmctld does not answer: $(tail -3 "$state/slurmctld.log")"
    for node in "${nodes[@]}"; do start_slurmd "$node"; done
    wait_until 30 ready "$count" || fail 1 "not all nodes came up: $(sinfo -N -l)"
    if [[ -n ${FLOWRL_OWNER:-} ]]; then
        # shellcheck disable=SC2016  # its own variables
        setsid bash -c 'while kill -0 "$1" 2>/dev/null; do sleep 1; done; "$2" down' - \
            "$FLOWRL_OWNER" "$here/slurm-local.sh" </dev/null >/dev/null 2>&1 &
    fi
    echo "slurm-local: $(sinfo --version), $(munged --version | sed 's/ (.*//'), $count nodes of $cpus processors: launch/slurm-local.sh exec sbatch ..."
}

down() {
    [[ -e $state/flowrl-slurm-local ]] || return 0
    hosts down
    rm -rf "$state"
}

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

command=${1:-}
(($# > 0)) && shift
case $command in
    up) up "$@" ;;
    down) down ;;
    exec) (($# > 0)) || usage && exec "$@" ;;
    status)
        hosts names
        sinfo -N -l
        squeue
        ;;
    kill-node) hosts kill "${1:?which node?}" ;;
    start-node)
        hosts start "${1:?which node?}"
        start_slurmd "$1"
        ;;
    cut-node | heal-node | freeze-node | thaw-node) hosts "${command%-node}" "${1:?which node?}" ;;
    *) usage ;;
esac
