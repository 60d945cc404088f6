# The commands people use; `just` lists them.

_default:
    @just --list

# Build the program
build:
    cargo build --release

# Test everything that needs no GPU
test:
    launch/test.sh

# Format, lints and the library's tests
quick:
    launch/test.sh quick

# Train the embedded task under mpirun: just demo 4 --set run.updates=50
demo *args:
    launch/quickstart.sh {{ args }}

# Build for GPUs, with a toolkit out of PyPI's packages: just cuda 90
cuda capability="90":
    eval "$(launch/cuda-home.sh)" && CUDA_COMPUTE_CAP={{ capability }} cargo build --release --features cuda

# Everything that needs a GPU
gpu:
    launch/gpu-check.sh

# Type-check the CUDA code without CUDA
check-cuda:
    launch/check-cuda.sh

# Check links, paths and commands of the documents
docs:
    cargo build --release
    python3 launch/check-docs.py target/release/flowrl-dist

# Write configs/reference.toml anew, from the types and their docs
reference:
    FLOWRL_WRITE_REFERENCE=1 cargo test --release --lib reference
