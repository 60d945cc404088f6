//! What the program does where CUDA, the driver or the GPU is missing, too old or not enough: told by stand-ins for the
//! driver's library, which the tests compile and this program, started again, finds before any other.

use crate::common::test_of;
use flowrl_dist::device::{DeviceChoice, select};
use std::path::Path;
use std::process::{Command, Output};

/// Says "ranks" to do in the run of a test; nothing in the run of the tests themselves.
const RANKS: &str = "FLOWRL_TEST_RANKS";
const CHOICE: &str = "FLOWRL_TEST_CHOICE";

/// Chooses a device, and prints which one, or the error with its exit code.
#[test]
fn worker() {
    let Ok(ranks) = std::env::var(RANKS) else { return };
    let choice = if std::env::var(CHOICE).unwrap() == "cuda" { DeviceChoice::Cuda } else { DeviceChoice::Auto };
    match select(choice, 0, ranks.parse().unwrap()) {
        Ok((device, why)) => println!("DEVICE {} because {why}", if device.is_cpu() { "cpu" } else { "gpu" }),
        Err(e) => println!("ERROR {}: {e}", e.exit_code()),
    }
}

/// A driver: what cuInit returns, its version, how many GPUs it has, and their compute capability.
struct Driver {
    init: u32,
    version: u32,
    count: u32,
    capability: (u32, u32),
}

/// One with which nothing is wrong.
const GOOD: Driver = Driver { init: 0, version: 99_000, count: 1, capability: CAPABILITY };

/// What this program was built for.
const CAPABILITY: (u32, u32) = match option_env!("CUDA_COMPUTE_CAP") {
    Some(built) => match u32::from_str_radix(built, 10) {
        Ok(built) => (built / 10, built % 10),
        Err(_) => panic!("CUDA_COMPUTE_CAP is no number"),
    },
    None => (9, 0),
};

const SOURCE: &str = r#"
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < COUNT ? 0 : 101; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Stand-in", length); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? MAJOR : attribute == 76 ? MINOR : 0;
    return 0;
}
"#;

impl Driver {
    /// Its library, in `folder`.
    fn build(&self, folder: &Path) {
        let Driver { init, version, count, capability: (major, minor) } = self;
        let source = folder.join("driver.c");
        std::fs::write(&source, SOURCE).unwrap();
        let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
        let status = Command::new(compiler)
            .args(["-shared", "-fPIC", "-o"])
            .args([&folder.join("libcuda.so.1"), &source])
            .args(
                [("INIT", init), ("VERSION", version), ("COUNT", count), ("MAJOR", major), ("MINOR", minor)]
                    .map(|(name, value)| format!("-D{name}={value}")),
            )
            .status();
        assert!(status.unwrap().success());
        // No real library of matrix products goes with it.
        for library in ["libcublas.so.13", "libcublas.so.12"] {
            std::fs::write(folder.join(library), "no library").unwrap();
        }
    }
}

/// A program that finds the libraries of `folder` first.
fn program(path: &Path, folder: &Path) -> Command {
    let mut command = Command::new(path);
    command.env("LD_LIBRARY_PATH", folder).env_remove("CUDA_VISIBLE_DEVICES");
    command
}

/// What the worker prints on a host with these libraries and so many ranks.
fn chosen(folder: &Path, choice: &str, ranks: usize) -> String {
    let mut command = program(&std::env::current_exe().unwrap(), folder);
    command
        .args([&test_of(module_path!(), "worker"), "--exact", "--nocapture"])
        .env(RANKS, ranks.to_string())
        .env(CHOICE, choice);
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    let line = stdout.lines().find_map(|line| Some(&line[line.find("DEVICE").or_else(|| line.find("ERROR"))?..]));
    line.unwrap_or_else(|| panic!("{stdout}")).to_owned()
}

/// `auto` computes on the CPU and says why; `cuda` refuses with the same words and exit code 2.
fn falls_back(folder: &Path, why: &str) {
    let auto = chosen(folder, "auto", 1);
    assert!(auto.starts_with("DEVICE cpu because the CPU: ") && auto.contains(why), "{auto}");
    let cuda = chosen(folder, "cuda", 1);
    assert!(cuda.starts_with("ERROR 2: parallel.device = \"cuda\", but ") && cuda.contains(why), "{cuda}");
}

#[test]
fn every_reason_is_named() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("libcuda.so.1"), "no library").unwrap();
    falls_back(folder.path(), "there is no NVIDIA driver (");
    let cases = [
        (Driver { init: 100, ..GOOD }, "the driver finds no GPU: ask the scheduler for one"),
        (Driver { init: 803, ..GOOD }, "does not fit its kernel module"),
        (Driver { init: 34, ..GOOD }, "is the toolkit's stub"),
        (Driver { init: 999, ..GOOD }, "does not start (code 999)"),
        (
            Driver { version: 11_040, ..GOOD },
            "the NVIDIA driver is too old: it is of CUDA 11.4, this program of CUDA 1",
        ),
        (Driver { count: 0, ..GOOD }, "the driver finds no GPU"),
        (Driver { capability: (7, 5), ..GOOD }, "GPU 0 (Stand-in) has compute capability 7.5: 8.0 is the least"),
        (GOOD, "libcublas.so.13 of CUDA 1"),
    ];
    for (driver, why) in cases {
        driver.build(folder.path());
        falls_back(folder.path(), why);
    }
}

#[test]
fn more_ranks_than_gpus_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    Driver { count: 4, ..GOOD }.build(folder.path());
    for choice in ["auto", "cuda"] {
        let refused = chosen(folder.path(), choice, 8);
        assert!(
            refused.starts_with("ERROR 2: 8 ranks on ")
                && refused.contains(", but 4 GPUs: start one rank for each GPU"),
            "{refused}"
        );
    }
}

#[test]
fn the_program_refuses_at_once_and_starts_without_cuda() {
    let folder = tempfile::tempdir().unwrap();
    Driver { init: 100, ..GOOD }.build(folder.path());
    let mut command = program(Path::new(env!("CARGO_BIN_EXE_flowrl-dist")), folder.path());
    let output =
        command.args(["--set", "parallel.device=cuda", "--out"]).arg(folder.path().join("out")).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("parallel.device = \"cuda\", but the driver finds no GPU"), "{stderr}");
    // What needs no GPU opens no library of CUDA's.
    std::fs::write(folder.path().join("libcuda.so.1"), "no library").unwrap();
    let mut command = program(Path::new(env!("CARGO_BIN_EXE_flowrl-dist")), folder.path());
    assert!(command.args(["plan", "--ranks", "2"]).output().unwrap().status.success());
}
