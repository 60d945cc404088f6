#!/usr/bin/env bash
# Virtual hosts on this machine, for tests over a real network: each has its own processes, name, shared memory and
# network; a cable (veth) leads to a bridge 10.231.X.0/24 of their own, on which this machine is .1. Files are shared.
#
#   launch/hosts-local.sh up NAME...         make hosts: the first is 10.231.X.11
#   launch/hosts-local.sh down               end them all, with whatever runs in them
#   launch/hosts-local.sh on NAME COMMAND... run a command in a host, named or by its address
#   launch/hosts-local.sh near NAME COMMAND  the same with this machine's processes and files, for a launcher that starts
#                                            ranks on other hosts
#   launch/hosts-local.sh kill NAME...       power off: every process of the host ends at once
#   launch/hosts-local.sh start NAME...      and on again
#   launch/hosts-local.sh cut|heal NAME      pull the cable; plug it in
#   launch/hosts-local.sh freeze|thaw NAME   stop every process of the host; let them go on
#   launch/hosts-local.sh address NAME       print its address;  names: print the hosts
#
# Needs root with the right to make namespaces. FLOWRL_HOSTS is the folder of their state, default /tmp/flowrl-hosts.
# Exit codes: 1 failed, 2 wrong usage, 3 privileges are missing.
set -euo pipefail

state=${FLOWRL_HOSTS:-/tmp/flowrl-hosts}
number=$(cksum <<<"$state" | cut -d' ' -f1)
network=10.231.$((number % 250 + 1))
bridge=flowrl$((number % 100000))

fail() {
    local code=$1
    shift
    printf 'hosts-local: %s\n' "$*" >&2
    exit "$code"
}

# --- processes --------------------------------------------------------------------------------------------------
# A host is the process `unshare`; its child is the host's process 1, with which the host ends. The start time beside
# the number tells a process from a later one with the same number.

start_time() {
    local line
    line=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # After the name, which may hold anything: state, parent, ...; the 20th is the start time.
    read -ra fields <<<"${line##*) }"
    [[ ${fields[0]} != Z ]] && echo "${fields[19]}"
}

# Prints the number of the host's `unshare`, if it lives.
outer() {
    local pid time
    read -r pid time 2>/dev/null <"$state/$1/process" && [[ $(start_time "$pid") == "$time" ]] && echo "$pid"
}

# Prints the number of the host's process 1, as this machine counts.
inner() {
    local pid
    pid=$(outer "$1") && pid=$(<"/proc/$pid/task/$pid/children") && [[ -n $pid ]] && echo "${pid%% *}"
}

# Prints the numbers of all processes whose `pid` (or `pid_for_children`) is a host's, as this machine counts.
processes() {
    local host folder
    host=$(readlink "/proc/$(inner "$1")/ns/pid")
    for folder in /proc/[0-9]*; do
        if [[ $(readlink "$folder/ns/$2" 2>/dev/null) == "$host" ]]; then
            echo "${folder#/proc/}"
        fi
    done
}

# wait_until SECONDS COMMAND...
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.05
    done
}

is_down() { ! outer "$1"; }

# --- hosts ------------------------------------------------------------------------------------------------------

names() { [[ -r $state/names ]] && cat "$state/names"; }

# Its number, for a name or an address.
index() {
    if [[ $1 == "$network".* ]]; then
        echo $((${1##*.} - 10))
        return
    fi
    names | grep -n -x -e "$1" | cut -d: -f1 | grep . || fail 2 "$1 is none of the hosts: $(names | tr '\n' ' ')"
}

address() {
    local number
    number=$(index "$1") && echo "$network.$((10 + number))"
}

# The end of the host's cable on this machine.
cable() {
    local number
    number=$(index "$1") && echo "$bridge.$number"
}

check_privileges() {
    ((EUID == 0)) || fail 3 "virtual hosts need root"
    command -v ip >/dev/null || fail 3 "the program ip is missing (Debian: iproute2)"
    unshare --pid --fork --mount-proc --uts --ipc --net true 2>/dev/null ||
        fail 3 "this machine does not allow namespaces (a container without CAP_SYS_ADMIN?)"
    ip link add "$bridge.t" type veth peer name "$bridge.u" 2>/dev/null ||
        fail 3 "this machine does not allow virtual cables (CAP_NET_ADMIN? kernel without veth?)"
    ip link del "$bridge.t"
}

# Process 1 of a host: waits, and collects the processes whose parents ended.
# shellcheck disable=SC2016  # its own variables
readonly INIT='
    hostname "$1"
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount --bind "$2/hosts" /etc/hosts
    trap "exit 0" TERM
    while :; do sleep infinity & wait $!; done'

start() {
    local name=$1 pid cable address
    address=$(address "$name") cable=$(cable "$name")
    outer "$name" >/dev/null && return
    mkdir -p "$state/$name"
    rm -rf "$state/$name/tmp"
    mkdir -m 1777 "$state/$name/tmp"
    ip link del "$cable" 2>/dev/null || true
    TMPDIR="$state/$name/tmp" setsid unshare --pid --fork --kill-child --mount-proc --uts --ipc --mount --net \
        bash -c "$INIT" "host-$name" "$name" "$state" </dev/null >"$state/$name/log" 2>&1 &
    pid=$!
    echo "$pid $(start_time "$pid")" >"$state/$name/process"
    wait_until 10 inner "$name" || fail 1 "$name did not start: $(cat "$state/$name/log")"
    pid=$(inner "$name")
    ip link add "$cable" type veth peer name eth0 netns "$pid"
    ip link set "$cable" master "$bridge" up
    nsenter -t "$pid" -n sh -c "ip link set lo up && ip address add $address/24 dev eth0 && ip link set eth0 up"
    wait_until 10 on "$name" grep -q "$name" /etc/hosts || fail 1 "$name did not come up: $(cat "$state/$name/log")"
}

on() {
    local name pid
    name=$(names | sed -n "$(index "$1")p")
    shift
    pid=$(inner "$name") || fail 1 "$name is off"
    TMPDIR="$state/$name/tmp" nsenter -t "$pid" --pid --uts --ipc --mount --net -- "$@"
}

# Whether packets reach the host: its answer to a connection that nobody takes.
is_reached() { [[ $(timeout 1 bash -c "exec 3<>/dev/tcp/$(address "$1")/9" 2>&1) == *refused* ]]; }

heal() {
    ip link set "$(cable "$1")" up
    # A host that was off has a new hardware address; the old one would be tried for a while.
    ip neigh flush dev "$bridge" 2>/dev/null || true
    wait_until 30 is_reached "$1" || fail 1 "$1 does not answer"
}

near() {
    local pid
    pid=$(inner "$1") || fail 1 "$1 is off"
    shift
    nsenter -t "$pid" --uts --ipc --net -- "$@"
}

power_off() {
    local pid
    if pid=$(inner "$1"); then
        kill -KILL "$pid" 2>/dev/null || true
        wait_until 10 is_down "$1" || fail 1 "$1 does not end"
    fi
    # The kernel takes its time with it.
    ip link del "$(cable "$1")" 2>/dev/null || true
}

up() {
    local name
    (($# > 0)) || fail 2 "up: name the hosts"
    check_privileges
    if [[ "$(names | tr '\n' ' ')" != "$* " ]]; then
        down
    fi
    mkdir -p "$state"
    printf '%s\n' "$@" >"$state/names"
    {
        echo '127.0.0.1 localhost'
        for name in "$@"; do echo "$(address "$name") $name"; done
    } >"$state/hosts"
    if ! ip link show "$bridge" >/dev/null 2>&1; then
        ip link add "$bridge" type bridge
        ip address add "$network.1/24" dev "$bridge"
        ip link set "$bridge" up
    fi
    for name in "$@"; do start "$name"; done
    for name in "$@"; do heal "$name"; done
}

down() {
    local name
    for name in $(names); do power_off "$name"; done
    ip link del "$bridge" 2>/dev/null || true
    rm -f "$state/names"
}

# signal NAME SIGNAL LINK
signal() {
    local pid
    for pid in $(processes "$1" "$3"); do kill -s "$2" "$pid" 2>/dev/null || true; done
}

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

command=${1:-}
(($# > 0)) && shift
case $command in
    up) up "$@" ;;
    down) down ;;
    names) names ;;
    start) for name in "$@"; do start "$name" && heal "$name"; done ;;
    kill) for name in "$@"; do power_off "$name"; done ;;
    on | near) (($# > 1)) || usage && "$command" "$@" ;;
    address) (($# == 1)) || usage && address "$1" ;;
    cut) (($# == 1)) || usage && ip link set "$(cable "$1")" down ;;
    heal) (($# == 1)) || usage && heal "$1" ;;
    freeze) (($# == 1)) || usage && signal "$1" STOP pid ;;
    # With those that wait outside for a command in the host: nsenter stops with its child.
    thaw) (($# == 1)) || usage && signal "$1" CONT pid_for_children ;;
    *) usage ;;
esac
