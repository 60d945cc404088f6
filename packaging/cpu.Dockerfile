# flowrl-dist for CPUs, with Open MPI. From the project's folder:
#
#   docker build -f packaging/cpu.Dockerfile -t flowrl-dist:cpu .
#   docker run --rm -v "$PWD/runs:/srv/flowrl/runs" flowrl-dist:cpu mpirun -n 2 --bind-to none --oversubscribe flowrl-dist
#
# The owner of the published repository adds org.opencontainers.image.source here.
FROM rust:1.95-bookworm AS build
# Of a release the distribution's own versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y libclang-dev libopenmpi-dev openmpi-bin \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked && strip target/release/flowrl-dist

FROM debian:bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y ca-certificates openmpi-bin openssh-client \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 flowrl \
    && mkdir /srv/flowrl && chown flowrl /srv/flowrl
COPY --from=build /src/target/release/flowrl-dist /usr/local/bin/
COPY --from=build /src/configs /opt/flowrl-dist/configs
COPY --from=build /src/LICENSE /src/assets/ocr/NOTICE /opt/flowrl-dist/
USER 1000
WORKDIR /srv/flowrl
CMD ["flowrl-dist", "--help"]
