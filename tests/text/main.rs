//! Tokenizers, the encoders of a pipeline folder, and the cache of their embeddings.

#![expect(clippy::unwrap_used, reason = "a test ends where something is wrong")]

mod cache;
mod encoders;
mod pipeline;
mod tokenizers;
