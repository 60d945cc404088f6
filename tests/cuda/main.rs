//! What runs on GPUs, on a real one or an emulated one.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test ends where something is wrong")]

#[cfg(feature = "cuda")]
#[allow(dead_code)] // not everything is used here
#[path = "../parity/mmdit/case.rs"]
mod case;
#[cfg(feature = "cuda")]
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "cuda")]
#[path = "../common/clip_rewards.rs"]
mod recorded;

mod cuda_kernels;
#[cfg(feature = "cuda")]
mod cuda_ops;
#[cfg(feature = "cuda")]
mod gpu_fallback;
#[cfg(feature = "cuda")]
mod nccl;
