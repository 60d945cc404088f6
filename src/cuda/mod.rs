//! Our kernels on NVIDIA GPUs: what candle has no kernel for, or none that differentiates.
//!
//! The sources in `kernels/` become machine code and PTX at build time. Each operation here lays out memory and launches, on anything that
//! is a [`Gpu`]: a real one, or, in tests/cuda_kernels, the same sources compiled for the CPU. Matrix products are cuBLASLt's.

pub mod attention;
pub mod deviation;
#[cfg(feature = "cuda")]
mod device;
pub mod elementwise;
mod gpu;
#[cfg(feature = "cuda")]
pub(crate) mod library;
#[cfg(feature = "cuda")]
mod module;
pub mod norm;
pub mod picture;
#[cfg(feature = "cuda")]
pub(crate) mod product;
pub mod reduce;

#[cfg(feature = "cuda")]
pub(crate) use device::{array, tensor};
pub use gpu::{Argument, Array, Gpu, Launch, ceil};
