#!/usr/bin/env bash
# A CUDA toolkit for building, out of NVIDIA's packages on PyPI, where there is no CUDA module and none can be installed:
#
#   eval "$(launch/cuda-home.sh [FOLDER])"          default: target/cuda
#   cargo build --release --features cuda
#
# It fetches the compiler, its headers and the runtime (100 MiB; 280 MiB unpacked), once, prints `export ...` lines on
# stdout and everything else on stderr. No GPU and no driver is needed; nor are the libraries of CUDA, which the program
# opens when it runs. To run on a GPU they are taken from a CUDA module, or from the same packages:
#
#   pip install --no-deps --require-hashes -r launch/pins/cuda-libraries.txt      (these come with PyTorch, too)
#   eval "$(launch/cuda-home.sh --libraries)"       exports LD_LIBRARY_PATH with those that python3 finds
#
# CUDA_COMPUTE_CAP says for which GPU candle's kernels are made: 80 A100, 86 A10 and RTX 30, 89 L40S and RTX 40, 90 H100 and
# H200 (the default), 100 B200. A driver of CUDA 13.0 (580) or newer is needed to run.
set -euo pipefail

say() { echo "cuda-home: $*" >&2; }
die() {
    say "$*"
    exit 1
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
pins=$root/launch/pins/cuda-compiler.txt

command -v python3 >/dev/null || die 'python3 is missing. Install it: apt install python3 python3-pip'

if [[ ${1:-} == --libraries ]]; then
    site=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    found=()
    for folder in "$site/nvidia/cu13/lib" "$site/nvidia/nccl/lib"; do
        [[ -d $folder ]] && found+=("$folder")
    done
    ((${#found[@]} > 0)) || die "no CUDA libraries in $site: pip install --no-deps --require-hashes -r launch/pins/cuda-libraries.txt"
    # shellcheck disable=SC2016 # for the shell that evaluates it
    printf 'export LD_LIBRARY_PATH=%q${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}\n' "$(IFS=:; echo "${found[*]}")"
    exit
fi

folder=${1:-$root/target/cuda}
mkdir -p "$folder"
folder=$(cd -- "$folder" && pwd)
home=$folder/nvidia/cu13

if ! cmp --silent "$pins" "$folder/installed.txt"; then
    say "fetching the compiler into $folder"
    rm -rf "$folder/nvidia"
    python3 -m pip --version >/dev/null 2>&1 || die 'pip is missing. Install it: apt install python3-pip'
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-compile \
        --no-cache-dir --only-binary=:all: --upgrade --target "$folder" --require-hashes --requirement "$pins" >&2
    rm -rf "$folder"/*.dist-info
    ln -sfn lib "$home/lib64" # where build scripts look
    "$home/bin/nvcc" --version >&2 || die 'the compiler does not run'
    cp "$pins" "$folder/installed.txt"
fi

cat <<EXPORTS
export CUDA_HOME=$(printf %q "$home")
export PATH=$(printf %q "$home/bin"):\$PATH
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
export CUDAFORGE_THREADS=\${CUDAFORGE_THREADS:-$(nproc)}
EXPORTS
