#!/usr/bin/env bash
# Makes this machine able to build and run flowrl-dist: Rust, compilers of C and C++ (the GPU's kernels are tested on the
# CPU), MPI with its headers, and libclang (the MPI bindings are generated when they are built). What is there already is
# used, a cluster's modules and conda's MPI included; only what is missing is installed, by apt and rustup, without questions.
#
#   launch/setup.sh                      prepares the machine; the other scripts source it
#
# Exit code 2: something is missing and cannot be installed from here; the command to run is printed.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
rust_needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")

have() { command -v "$1" >/dev/null 2>&1; }

say() { printf 'setup: %-11s %s\n' "$1" "$2"; }

give_up() {
    printf 'setup: %s\n' "$@" >&2
    exit 2
}

# --- what is here -----------------------------------------------------------------------------------------------

# rustup puts cargo where a shell that was not started anew does not look.
find_cargo() {
    local bin=${CARGO_HOME:-$HOME/.cargo}/bin
    if ! have cargo && [[ -x $bin/cargo ]]; then
        export PATH="$bin:$PATH"
    fi
    have cargo
}

# The version of the cargo that the given words run, "cargo" by default, or nothing.
cargo_version() { "${@:-cargo}" --version 2>/dev/null | sed -n 's/^cargo \([0-9.]*\).*/\1/p'; }

# Whether version $1 is $rust_needed or newer.
new_enough() { [[ -n $1 && $(printf '%s\n' "$rust_needed" "$1" | sort -V | sed -n 1p) == "$rust_needed" ]]; }

rust_ready() { find_cargo && new_enough "$(cargo_version)"; }

compiler() {
    local name
    for name in ${CC:+"$CC"} cc; do
        if have "$name"; then
            echo "$name"
            return
        fi
    done
    return 1
}

# MPI is here when its compiler wrapper finds the headers; Debian's openmpi-bin brings the wrapper without them.
mpi_ready() {
    local wrapper=${MPICC:-mpicc}
    have "$wrapper" && echo '#include <mpi.h>' | "$wrapper" -E -x c - >/dev/null 2>&1
}

mpi_version() {
    local launcher
    for launcher in mpirun mpiexec; do
        if have "$launcher"; then
            "$launcher" --version 2>/dev/null | awk '/MPI|Version:/ && !seen++ { $1 = $1; print }'
            return
        fi
    done
    echo "no mpirun on the PATH: launch with srun"
}

# The libclang that bindgen would load; libclang-cpp is another library.
find_libclang() {
    local folder
    if [[ -n ${LIBCLANG_PATH:-} ]]; then
        echo "$LIBCLANG_PATH"
        return
    fi
    if have llvm-config; then
        folder=$(llvm-config --libdir)
        compgen -G "$folder/libclang[.-][!c]*" | grep '\.so' | sed -n 1p | grep . && return
    fi
    PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null |
        sed -n 's/.*libclang\(-[0-9.]*\)\{0,1\}\.so.* => //p' | sort -V | sed -n '$p' | grep .
}

# Debian packs libclang and clang's own headers (stddef.h) apart, and bindgen needs both. Prints the package that is
# missing where libclang is Debian's and alone.
headers_missing() {
    local version
    [[ $1 =~ (llvm|libclang)-([0-9]+) ]] || return 1
    version=${BASH_REMATCH[2]}
    dpkg-query -W "libclang1-$version" >/dev/null 2>&1 || return 1
    ! compgen -G "/usr/lib/llvm-$version/lib/clang/*/include/stddef.h" >/dev/null || return 1
    echo "libclang-common-$version-dev"
}

# --- what is missing --------------------------------------------------------------------------------------------

# Prints the name of each missing part: a name of ours, or a package's.
missing_parts() {
    local libclang
    { compiler >/dev/null && have "${CXX:-c++}"; } || echo compiler
    mpi_ready || echo mpi
    if libclang=$(find_libclang); then
        headers_missing "$libclang" || true
    else
        echo libclang
    fi
    # rustup comes over the network.
    rust_ready || have rustup || have curl || have wget || echo download
}

mpi_packages() {
    local wrapper=${MPICC:-mpicc}
    if ! have "$wrapper"; then
        echo openmpi-bin libopenmpi-dev
    elif [[ $(readlink -f "$(command -v "$wrapper")") == */opal_wrapper ]]; then
        echo libopenmpi-dev
    else
        # Somebody's own MPI: it is theirs to repair.
        return 1
    fi
}

# The library and clang's headers in the release's default version; libclang-dev, which brings 240 MB more, where the
# release packs them otherwise.
libclang_packages() {
    local version
    version=$(apt-cache depends libclang-dev 2>/dev/null | sed -n 's/.*Depends: libclang-\([0-9]*\)-dev.*/\1/p' | sed -n 1p)
    if [[ -n $version ]] && apt-cache show "libclang1-$version" "libclang-common-$version-dev" >/dev/null 2>&1; then
        echo "libclang1-$version" "libclang-common-$version-dev"
    else
        echo libclang-dev
    fi
}

packages_for() {
    local part
    for part in "$@"; do
        case $part in
            compiler) echo gcc g++ libc6-dev ;;
            mpi) mpi_packages ;;
            libclang) libclang_packages ;;
            download) echo curl ca-certificates ;;
            *) echo "$part" ;;
        esac
    done
}

# --- installing -------------------------------------------------------------------------------------------------

apt_get() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 "$@"
}

install_packages() {
    local -a parts as_root=() packages
    mapfile -t parts < <(missing_parts)
    if ((${#parts[@]} == 0)); then
        return
    fi
    if [[ " ${parts[*]} " == *" mpi "* ]] && ! mpi_packages >/dev/null; then
        give_up "${MPICC:-mpicc} does not find mpi.h: load your MPI's module or repair its installation"
    fi
    if ! have apt-get; then
        give_up "missing: ${parts[*]}; there is no apt here" \
            "install compilers of C and C++, an MPI with its headers (mpicc on the PATH) and libclang with clang's headers"
    fi
    if ((EUID != 0)); then
        if have sudo && sudo -n true 2>/dev/null; then
            as_root=(sudo)
        else
            read -ra packages <<<"$(packages_for "${parts[@]}" | tr '\n' ' ')"
            give_up "missing: ${parts[*]}; this needs root. Run" \
                "    sudo apt-get update && sudo apt-get install -y --no-install-recommends ${packages[*]}"
        fi
    fi
    apt_get update -q >/dev/null || say apt "update failed; trying with the lists that are here"
    read -ra packages <<<"$(packages_for "${parts[@]}" | tr '\n' ' ')"
    apt_get install -q -y --no-install-recommends "${packages[@]}" >/dev/null ||
        give_up "apt-get could not install: ${packages[*]}"
    say installed "${packages[*]}"
}

# Fetches rustup's installer, of a fixed version, into the file $1, and compares its digest.
fetch_rustup() {
    local host digest url
    case $(uname -m) in
        x86_64)
            host=x86_64-unknown-linux-gnu
            digest=20a06e644b0d9bd2fbdbfd52d42540bdde820ea7df86e92e533c073da0cdd43c
            ;;
        aarch64)
            host=aarch64-unknown-linux-gnu
            digest=e3853c5a252fca15252d07cb23a1bdd9377a8c6f3efa01531109281ae47f841c
            ;;
        *) return 1 ;;
    esac
    url=https://static.rust-lang.org/rustup/archive/1.28.2/$host/rustup-init
    if have curl; then
        curl --proto '=https' --tlsv1.2 -fsS --max-time 120 -o "$1" "$url"
    else
        wget -q -T 60 -O "$1" "$url"
    fi && echo "$digest  $1" | sha256sum --check --status && chmod +x "$1"
}

install_rust() {
    local installer
    if rust_ready; then
        return
    fi
    if have rustup; then
        # An older default or a pinned toolchain stays as it is: only our own commands use the newer one.
        if ! new_enough "$(cargo_version rustup run stable cargo)"; then
            rustup toolchain install stable --profile minimal --component clippy --component rustfmt ||
                give_up "Rust $rust_needed or newer is needed, and rustup cannot fetch it. With a network: rustup update stable"
            say installed "Rust, the stable toolchain"
        fi
        export RUSTUP_TOOLCHAIN=stable
    else
        installer=$(mktemp)
        if ! fetch_rustup "$installer" ||
            ! "$installer" -y --no-modify-path --profile minimal --default-toolchain stable -c clippy -c rustfmt; then
            rm -f "$installer"
            give_up "Rust $rust_needed or newer is needed$(find_cargo && echo ", cargo is $(cargo_version)")" \
                "rustup cannot be fetched from here: install it from https://rustup.rs, or load your cluster's module"
        fi
        rm -f "$installer"
        # Ahead of a system's older cargo.
        export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
        say installed "Rust, by rustup"
    fi
    rust_ready || give_up "cargo is $(cargo_version), and $rust_needed or newer is needed"
}

setup() {
    install_packages
    install_rust
    say cargo "$(cargo_version)"
    say "C compiler" "$(compiler)"
    say MPI "$(mpi_version)"
    say libclang "$(find_libclang)"
}

setup
