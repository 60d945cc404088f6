#!/usr/bin/env bash
# Builds the feature `cuda` on a machine without CUDA. candle's kernels want nvcc even to be checked, so a stand-in gives
# their build script empty outputs. This proves types, and what the program does where it finds no GPU: not the kernels.
#
#   launch/check-cuda.sh [clippy|doc|test|... [arguments]]      a cargo command; default: check --all-targets
#   launch/check-cuda.sh assemble                               our kernels of the last release build, by ptxas
#
# Where FLOWRL_NVCC names a real nvcc, a release build compiles our kernels and candle's with it, but for candle's quantised
# and mixture-of-experts ones, which take minutes and which this program never calls.
#
# The empty outputs must never meet a real build, so they have a target folder of their own: target/check. It takes over
# what target/release has of dependencies, as copies: nothing ever goes the other way.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export CARGO_TARGET_DIR="$root/target/check"

write_stand_in() {
    mkdir -p "$1"
    cat >"$1/nvcc" <<'NVCC'
#!/bin/sh
# Stands in for nvcc where a build is only checked: empty outputs under the names that are asked for.
if [ -n "${FLOWRL_NVCC:-}" ]; then
    case " $* " in
        *" --lib "* | *quantized.cu* | */moe/* | *mmvq_gguf.cu* | */mmq_gguf/*) ;;
        *) exec "$FLOWRL_NVCC" "$@" ;;
    esac
fi
out='' folder='' kind='' source=''
while [ $# -gt 0 ]; do
    case $1 in
        --version) echo 'Cuda compilation tools, release 13.0, V13.0.88'; exit ;;
        --list-gpu-code) echo sm_90; exit ;;
        --ptx) kind=ptx ;;
        -fatbin) kind=fatbin ;;
        -c) kind=object ;;
        --lib) kind=archive ;;
        -o) shift; out=$1 ;;
        --output-directory) shift; folder=$1 ;;
        *.cu) source=$1 ;;
    esac
    shift
done
case $kind in
    ptx) name=${source##*/}; : >"${out:-$folder/${name%.cu}.ptx}" ;;
    object) : >"$out" ;;
    fatbin) echo none >"$out" ;;
    archive) rm -f "$out"; ar crs "$out" ;;
esac
NVCC
    chmod +x "$1/nvcc"
}

# Cargo looks at each dependency and builds those again that differ: what knows of CUDA.
take_over_dependencies() {
    local from=$root/target/release to=$CARGO_TARGET_DIR/release
    [[ -d $from/deps && ! -e $to ]] || return 0
    rm -rf "$to.part"
    mkdir -p "$to.part/deps"
    cp -a --reflink=auto "$from/.fingerprint" "$from/build" "$to.part"
    find "$from/deps" -name 'lib*' ! -name 'libflowrl*' -exec cp -a --reflink=auto -t "$to.part/deps" {} +
    mv "$to.part" "$to"
}

# What ptxas said of our kernels in the newest build, for each of the GPUs that they are made for.
assemble() {
    local folder told
    folder=$(find "$CARGO_TARGET_DIR/release/build" -path '*flowrl-dist-*/out/attention.resources' -size +0 -printf '%T@ %h\n' | sort -n | tail -n 1)
    [[ -n $folder && -n ${FLOWRL_NVCC:-} ]] || {
        echo 'check-cuda: there are no kernels that a real nvcc has compiled' >&2
        exit 77
    }
    for told in "${folder#* }"/*.resources; do
        awk -v name="$(basename "$told" .resources)" '
            /Compiling entry function/ { gpu = $NF; gsub(/\047/, "", gpu) }
            /Used/ { kernels[gpu]++ }
            /spill stores/ && !/ 0 bytes spill stores/ { spills[gpu]++ }
            !/^ptxas info/ && !/bytes stack frame/ { print; odd = 1 }
            END {
                for (gpu in kernels) printf "%s for %s: %d kernels, %d of them spill registers\n", name, gpu, kernels[gpu], spills[gpu]
                exit odd || !(name ~ /hopper/ ? kernels["sm_90a"] : kernels["sm_80"] && kernels["sm_90"])
            }' "$told"
    done
}

(($# > 0)) || set -- check --all-targets
command=$1
shift

if [[ $command == assemble ]]; then
    assemble
    exit
fi
if [[ $command == bench || " $* " == *' --release '* ]]; then
    take_over_dependencies
else
    unset FLOWRL_NVCC
fi
write_stand_in "$CARGO_TARGET_DIR/stand-in"
unset NVCC
export PATH="$CARGO_TARGET_DIR/stand-in:$PATH"
# What build scripts would ask a GPU and a toolkit for: Hopper, CUDA 13.0.
export CUDA_COMPUTE_CAP=90 CUDARC_CUDA_VERSION=13000

cargo "$command" --manifest-path "$root/Cargo.toml" --features cuda "$@"
