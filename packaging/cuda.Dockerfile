# flowrl-dist for NVIDIA GPUs, without MPI: ranks meet over TCP, NCCL carries the rest. From the project's folder:
#
#   docker build -f packaging/cuda.Dockerfile --build-arg CAPABILITY=90 -t flowrl-dist:cuda .
#   docker run --rm --gpus all --ipc host flowrl-dist:cuda flowrl-dist --set parallel.device=cuda
#
# CAPABILITY: 80 A100, 89 L40S, 90 H100 and H200. The driver of the host must know CUDA 13.0 (580 or newer).
# The owner of the published repository adds org.opencontainers.image.source here.
ARG CUDA=13.0.0
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
ARG CAPABILITY=90
ARG RUST=1.95.0
# Of a release the distribution's own versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y build-essential ca-certificates curl \
    && rm -rf /var/lib/apt/lists/*
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN curl --proto '=https' --tlsv1.2 -fsS https://sh.rustup.rs | sh -s -- -y --profile minimal --default-toolchain ${RUST}
ENV PATH=/root/.cargo/bin:$PATH CUDA_COMPUTE_CAP=${CAPABILITY}
WORKDIR /src
COPY . .
RUN cargo build --release --locked --no-default-features --features cuda && strip target/release/flowrl-dist

# The runtime image brings cuBLAS, cuBLASLt, cuRAND and NCCL; the driver comes from the host.
FROM nvidia/cuda:${CUDA}-runtime-ubuntu24.04
COPY --from=build /src/target/release/flowrl-dist /usr/local/bin/
COPY --from=build /src/configs /opt/flowrl-dist/configs
COPY --from=build /src/LICENSE /src/assets/ocr/NOTICE /opt/flowrl-dist/
WORKDIR /srv/flowrl
CMD ["flowrl-dist", "--help"]
