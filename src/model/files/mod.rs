//! Weight files of the ecosystem: safetensors in the layouts that diffusers, PEFT and the model's authors write.

mod find;
mod weights;

pub use weights::Weights;

#[cfg(test)]
mod tests;
