#!/usr/bin/env bash
# Runs a command, built with the feature `cuda`, on a GPU that is emulated on the CPU: for tests, where there is none.
#
#   launch/emulate-gpu.sh launch/check-cuda.sh test --release --test cuda cuda_ops
#
# Stand-ins for the driver, cuBLAS, cuBLASLt, cuRAND and NCCL are compiled from tests/emulator, with our kernels and
# candle's as C++ in them; the program opens them as it would the real ones. What this shows: that what the program gives to
# a GPU, in that order, computes what it should. Not: that nvcc and the real libraries agree, races within a block, speed.
# The variables EMULATED_GPU_... are explained in tests/emulator/libraries.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
folder=$root/target/emulated-gpu
compiler=${CXX:-c++}
flags=(-std=c++17 -O2 -fPIC -fno-strict-aliasing -w)

# Where cargo keeps the sources of candle's kernels.
candle_kernels() {
    local host
    host=$(rustc -vV | sed -n 's/^host: //p')
    cargo metadata --format-version 1 --features cuda --filter-platform "$host" --manifest-path "$root/Cargo.toml" |
        grep -o '"manifest_path":"[^"]*candle-kernels-[^"]*"' | sed -n '1s/.*:"\(.*\)\/Cargo.toml"/\1\/src/p'
}

# compile OBJECT SOURCE [FLAGS]: where a source is newer.
compile() {
    local object=$1 source=$2
    shift 2
    local read=("$root/tests/emulator" "$root/src/cuda/kernels" "${BASH_SOURCE[0]}")
    [[ ! -e $object || -n $(find "${read[@]}" -newer "$object" -type f | head -n 1) ]] || return 0
    "$compiler" "${flags[@]}" "$@" -c -o "$object.part" "$source"
    mv "$object.part" "$object"
}

# A source of candle's, and a list of the kernels that the compiler finds in it.
compile_candle() {
    local name=$1 sources=$2 here=$root/tests/emulator/candle
    # As nvcc 13 for compute capability 8.0 would.
    local told=(-D__CUDA_ARCH__=800 -D__CUDACC_VER_MAJOR__=13 -D__CUDACC_VER_MINOR__=0 -I"$here" -I"$sources")
    {
        printf '#include "%s.cu"\nstatic host::Listed listed = {\n' "$name"
        "$compiler" "${flags[@]}" "${told[@]}" -D__global__=KERNEL -E -x c++ "$sources/$name.cu" |
            grep -oE 'extern "C" (inline )?KERNEL *void *\w+ *\(' | sed -E 's/.*void *(\w+).*/    {"\1", host::Entry<\1>::bind},/'
        printf '};\n'
    } >"$folder/candle_$name.cpp"
    compile "$folder/candle_$name.o" "$folder/candle_$name.cpp" "${told[@]}"
}

build() {
    local sources name
    mkdir -p "$folder"
    sources=$(candle_kernels)
    compile "$folder/ours.o" "$root/tests/emulator/ours/kernels.cpp" -I"$root/tests/emulator/ours" -I"$root/src/cuda/kernels"
    for name in affine binary cast conv fill indexing reduce ternary unary; do
        compile_candle "$name" "$sources"
    done
    for name in driver products nccl; do
        compile "$folder/$name.o" "$root/tests/emulator/libraries/$name.cpp" -O3 -march=native
    done
    "$compiler" -shared -pthread -o "$folder/libcuda.so.part" "$folder"/*.o
    mv "$folder/libcuda.so.part" "$folder/libcuda.so.1"
    for name in libcublas.so.13 libcublasLt.so.13 libcurand.so.10 libnccl.so.2; do
        ln -sfn libcuda.so.1 "$folder/$name"
    done
}

(($# > 0)) || {
    echo 'usage: launch/emulate-gpu.sh COMMAND [ARGUMENTS]' >&2
    exit 2
}
build >&2
export EMULATED_GPU=1 LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
exec "$@"
