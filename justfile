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

# Type-check the CUDA code without CUDA
check-cuda:
    launch/check-cuda.sh
