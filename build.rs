//! The feature `cuda`: compiles our kernels, and makes every library of CUDA one that is opened at run time.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// What nvcc makes of a kernel: machine code for 8.0, which runs on all of 8.x, for 9.0, and PTX, which the driver of a newer
/// GPU translates. The virtual architecture is that of the first GPUs with bf16 matrix instructions.
const AMPERE: &str = "arch=compute_80,code=[sm_80,sm_90,compute_80]";

/// With the matrix instructions of a warpgroup, which no other GPU has.
const HOPPER: &str = "arch=compute_90a,code=sm_90a";

/// The kernels' sources in src/cuda/kernels.
const KERNELS: [(&str, &str); 8] = [
    ("elementwise", AMPERE),
    ("reduce", AMPERE),
    ("norm", AMPERE),
    ("deviation", AMPERE),
    ("picture", AMPERE),
    ("attention", AMPERE),
    ("attention_hopper", HOPPER),
    ("attention_any", AMPERE),
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(variable("OUT_DIR"));
    compile_kernels(&out);
    tell_versions();
    let functions = read("src/cuda/functions.txt");
    write(&out.join("functions.rs"), stand_ins(&functions, &variable("CARGO_CFG_TARGET_ARCH")));
    satisfy_linker(&out.join("libraries"));
}

/// A fat binary of every source, by the nvcc that compiles candle's kernels; beside it what ptxas says of the kernels, their
/// registers and spills.
fn compile_kernels(out: &Path) {
    println!("cargo::rerun-if-changed=src/cuda/kernels");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let nvcc = nvcc();
    // Machine code for newer GPUs, too, where the program is built for one.
    let newer =
        capability().and_then(|capability| capability.parse::<u32>().ok()).filter(|&capability| capability >= 100);
    for (kernel, targets) in KERNELS {
        let source = format!("src/cuda/kernels/{kernel}.cu");
        let mut command = Command::new(&nvcc);
        command.args(["-std=c++17", "-O3", "-Xptxas", "-v", "-fatbin", "-gencode", targets]);
        if let Some(capability) = newer.filter(|_| targets == AMPERE) {
            command.args(["-gencode", &format!("arch=compute_80,code=sm_{capability}")]);
        }
        let output = command.arg("-o").arg(out.join(format!("{kernel}.fatbin"))).arg(&source).output();
        let output = output.unwrap_or_else(|e| {
            panic!("{} cannot be run ({e}): load the CUDA module or see launch/cuda-home.sh", nvcc.display())
        });
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{source}: {} ended with {}\n{told}", nvcc.display(), output.status);
        write(&out.join(format!("{kernel}.resources")), told.into_owned());
    }
}

/// The GPUs that the program is built for, "90" for compute capability 9.0, where anything says it.
fn capability() -> Option<String> {
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    env::var("CUDA_COMPUTE_CAP").ok().or_else(capability_here).map(|capability| capability.trim().to_owned())
}

/// What the program compares with the driver and the GPU that it finds.
fn tell_versions() {
    if let Some(capability) = capability() {
        println!("cargo::rustc-env=FLOWRL_CUDA_CAPABILITY={capability}");
    }
    let told = Command::new(nvcc())
        .arg("--version")
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let told = told.unwrap_or_else(|e| panic!("nvcc --version: {e}"));
    let release = told
        .split("release ")
        .nth(1)
        .and_then(|rest| rest.split([',', ' ']).next())
        .and_then(|release| release.split_once('.'));
    let Some((Ok(major), Ok(minor))) = release.map(|(major, minor)| (major.parse::<u32>(), minor.parse::<u32>()))
    else {
        panic!("nvcc --version names no release: {told}")
    };
    println!("cargo::rustc-env=FLOWRL_CUDA_VERSION={}", 1000 * major + 10 * minor);
}

/// That of the first GPU here, for which candle's build makes its kernels where it is not told: "90".
fn capability_here() -> Option<String> {
    let told = Command::new("nvidia-smi").args(["--query-gpu=compute_cap", "--format=csv,noheader"]).output().ok()?;
    let told = String::from_utf8(told.stdout).ok()?.lines().next()?.replace('.', "");
    told.trim().parse::<u32>().is_ok().then_some(told)
}

/// As candle's build finds it.
fn nvcc() -> PathBuf {
    let on_path =
        || env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file());
    let at_home =
        || env::var_os("CUDA_HOME").or_else(|| env::var_os("CUDA_PATH")).map(|home| Path::new(&home).join("bin/nvcc"));
    env::var_os("NVCC")
        .map(PathBuf::from)
        .or_else(on_path)
        .or_else(at_home)
        .unwrap_or_else(|| "/usr/local/cuda/bin/nvcc".into())
}

/// A function of each name that jumps to where its slot points to, the slots of each library in a row, and the names:
/// see src/cuda/library.rs.
fn stand_ins(functions: &str, architecture: &str) -> String {
    println!("cargo::rerun-if-changed=src/cuda/functions.txt");
    let jump = match architecture {
        "x86_64" => "jmp qword ptr [rip + 2b]",
        "aarch64" => "adrp x16, 2b; ldr x16, [x16, :lo12:2b]; br x16",
        other => panic!("the feature cuda is not there for {other}"),
    };
    let (mut asm, mut statics, mut table) = (String::new(), String::new(), String::new());
    let lines = functions.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("\n");
    for (number, library) in lines.split('[').skip(1).enumerate() {
        let (files, names) = library.split_once(']').expect("functions.txt: a library's files in brackets");
        let files: Vec<_> = files.split_whitespace().collect();
        let names: Vec<_> = names.split_whitespace().collect();
        let (slots, count) = (format!("flowrl_slots_{number}"), names.len());
        asm += &format!(
            ".section .data.{slots}, \"aw\", @progbits\n.balign 8\n.globl {slots}\n.hidden {slots}\n{slots}:\n"
        );
        for name in &names {
            asm += &format!(
                ".section .data.{slots}, \"aw\", @progbits\n2: .quad flowrl_absent\n\
                 .section .text.{name}, \"ax\", @progbits\n.globl {name}\n.hidden {name}\n.type {name}, @function\n\
                 {name}: {jump}\n"
            );
        }
        statics += &format!("    static {slots}: [AtomicPtr<c_void>; {count}];\n");
        table += &format!(
            "    // SAFETY: the assembly defines as many slots as there are names.\n    \
             Entry {{ files: &{files:?}, names: &{names:?}, slots: unsafe {{ &{slots} }} }},\n"
        );
    }
    let count = statics.lines().count();
    format!(
        "std::arch::global_asm!(r#\".pushsection .text\n{asm}.popsection\n\"#);\n\
         unsafe extern \"C\" {{\n{statics}}}\n\
         static LIBRARIES: [Entry; {count}] = [\n{table}];\n"
    )
}

/// cudarc and candle ask the linker for libraries that stand_ins has made superfluous: it finds empty ones. The runtime,
/// which candle's quantised kernels call, is linked statically where the toolkit has it.
fn satisfy_linker(folder: &Path) {
    fs::create_dir_all(folder).expect("the output folder can be written");
    for library in ["cuda", "cublas", "cublasLt", "curand", "nvrtc", "nccl"] {
        write(&folder.join(format!("lib{library}.a")), "!<arch>\n".into());
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let homes = homes.chain([PathBuf::from("/usr/local/cuda")]);
    let candidates = homes.flat_map(|home| ["lib64", "lib"].map(|lib| home.join(lib).join("libcudart_static.a")));
    let runtime = folder.join("libcudart.a");
    match candidates.into_iter().find(|file| file.is_file()) {
        Some(file) => {
            fs::copy(&file, &runtime).expect("libcudart_static.a can be copied");
            ["dl", "rt", "pthread"].iter().for_each(|library| println!("cargo::rustc-link-lib={library}"));
        }
        None => write(&runtime, "!<arch>\n".into()),
    }
    println!("cargo::rustc-link-search=native={}", folder.display());
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn write(path: &Path, text: String) {
    fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
