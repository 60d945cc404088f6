//! Weight files of the ecosystem: safetensors in the layouts that diffusers, PEFT and the model's authors write.

mod adapter;
mod describe;
mod digests;
mod find;
mod finite;
mod folder;
mod format;
mod index;
mod lora_names;
mod parts;
mod peft;
mod pickle;
mod pipeline;
mod sai;
mod same;
mod scheduler;
mod transformer;
mod weights;

pub use adapter::Adapter;
pub use describe::{AdapterDescription, Description, PartDescription, describe};
pub use digests::digests;
pub use folder::{Part, open_part};
pub use format::{Format, GLYPHS, SHAPES};
pub use index::{Index, has_t5};
pub use parts::parts;
pub use pickle::AnyWeights;
pub use pipeline::misfits;
pub use scheduler::{SCHEDULER, SHIFT_REMEDY, read_shift};
pub use transformer::{Loaded, Transformer};
pub use weights::Weights;

#[cfg(test)]
mod tests;
