//! The text side of Stable Diffusion 3.5: prompts to tokens, tokens to what the transformer is conditioned on, as
//! diffusers' `StableDiffusion3Pipeline` does it (pipelines/stable_diffusion_3 of v0.33.1).
//!
//! ```text
//! prompt -> tokens -> CLIP-L, CLIP-G, T5 -> context [B, 77 + T5 tokens, D], pooled [B, P]
//! ```

mod encoders;
mod t5;
mod tokenizer;

pub use encoders::{Embeddings, Encoding, MOST_T5_TOKENS, TextEncoders};
pub use t5::{T5Config, T5Encoder, T5Output};
pub use tokenizer::{Tokenizer, uncurl};
