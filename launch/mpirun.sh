#!/usr/bin/env bash
# Starts the program on the hosts of a hostfile, and again where a rank, a host or the network was lost: it resumes from the
# newest complete checkpoint.
#
#   launch/mpirun.sh --hostfile hosts.txt --config my.toml --out /shared/runs/a
#   launch/mpirun.sh -n 4 --set run.updates=50                 4 ranks on this host
#
# -n RANKS (default: the slots of the hosts, 2 without a hostfile) and --hostfile FILE come first; the rest are the program's
# arguments. A line of the hostfile is "node1 slots=8" (MPICH: "node1:8"). The run folder must be the same on all hosts.
#
# SIGUSR1, SIGTERM, SIGINT and SIGHUP make the ranks save and leave: exit code 75, and the same command continues. Read from the
# environment, beside what launch/supervise.sh reads:
#   FLOWRL_HOSTFILE      the hostfile
#   FLOWRL_MPIRUN_FLAGS  further flags for mpirun: "--mca plm_rsh_agent rsh"
# Exit codes: the program's; 75 as well where ranks were lost FLOWRL_TRIES times in a row. The program's own options:
# target/release/flowrl-dist --help
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/supervise.sh
source "$root/launch/supervise.sh"

ranks='' hostfile=${FLOWRL_HOSTFILE:-}
while (($# > 0)); do
    case $1 in
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        -n | --hostfile) (($# > 1)) || refuse "$1 needs a value: launch/mpirun.sh [-n RANKS] [--hostfile FILE] ARGUMENTS" ;;&
        -n) ranks=$2 && shift 2 ;;
        --hostfile) hostfile=$2 && shift 2 ;;
        *) break ;;
    esac
done
if [[ -z $hostfile ]]; then
    ranks=${ranks:-2}
fi
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || refuse "-n $ranks: must be a number of ranks"
[[ -z $hostfile || -r $hostfile ]] || refuse "--hostfile $hostfile: there is no such file"
prepare "$root"
command -v mpirun >/dev/null || refuse "no mpirun on the PATH: load the MPI module the program was built with"

mpirun_flags
[[ -z $ranks ]] || flags+=(-n "$ranks")
if [[ -n $hostfile ]]; then
    if is_open_mpi; then flags+=(--hostfile "$hostfile"); else flags+=(-f "$hostfile"); fi
elif is_open_mpi; then
    flags+=(--oversubscribe) # on one host, more ranks than cores are the user's wish
fi

again_at_75=1
code=0
say "mpirun ${flags[*]} ${command[*]} $*"
supervise mpirun "${flags[@]}" "${rank[@]}" "$@" || code=$?
case $code in
    0 | 1 | 2 | 101) exit "$code" ;;
    *) exit 75 ;;
esac
