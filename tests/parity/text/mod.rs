//! Tokenizers, the encoders of a pipeline folder, and the cache of their embeddings.

mod cache;
mod encoders;
mod pipeline;
mod tokenizers;
