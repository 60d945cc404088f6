//! Online RL post-training of rectified-flow text-to-image models on many ranks.
//!
//! Every rank samples its share of the prompt groups with the *old* policy, scores the images, all ranks gather the
//! rewards and compute the same group-relative advantages, then they reduce the gradient of an advantage-weighted
//! rectification loss over a sharded optimizer. One iteration, top to bottom, is [`train::Trainer::iteration`].
//! A reward or a method of your own goes in by [`train::Own`]: `examples/own_reward.rs`, `examples/own_method.rs`.
//!
//! # Data flow
//! ```text
//! prompts -> conditioning -> x0 -> images -> rewards -> advantages -> (x_t, t, target) -> velocity -> loss -> gradients -> shards
//!   data       model        flow    model    reward     advantage        objective          model            engine       optim
//! ```
//! and from the shards to the old policy, the EMA ([`policy`]) and the checkpoint ([`checkpoint`]).
//!
//! # Legend of dimensions
//! | letter | meaning |
//! |---|---|
//! | P | prompts (groups) of one iteration, over all ranks |
//! | K | images of one prompt |
//! | N | images of one iteration over all ranks, P * K |
//! | B | micro-batch: samples that go through the model at once, always the same number (padded) |
//! | C, H, W | channels, height and width of a latent (for pixel-space models: of the picture) |
//! | L | text tokens |
//! | D | model width |
//! | T | solver steps of a rollout |
//! | R | ranks (world size) |
//! | S | length of one rank's shard: the sum over stages of ceil(stage's trainable parameters / parts), parts = R, or 1 with `shard = "none"` |
//!
//! `t` is always in [0, 1] and 1 is noise: `x_t = (1 - t) x0 + t eps`, velocity `u = eps - x0`,
//! `x0` estimate `x_t - t v`. An *iteration* is one rollout round, an *update* one optimizer step.
//!
//! # Precision, once
//! Weights and activations of the model, and what of its weights travels: `model.dtype`, f32 or bf16; norms and softmax
//! in it: f32. Adapters: f32 in either, from the master parameters to their products, in which a GPU in bf16 takes a factor
//! as high and low halves; the sum of an adapter and its layer is rounded. Master parameters, moments, old policy, EMA, the sum of gradients and its reduction, and every state of a
//! solver: f32. A gradient has the type of its weight until it is added to the sum.
//! Rewards, advantages, solver sigmas and every statistic: f64.

pub mod advantage;
#[doc(hidden)]
pub mod allocator;
pub mod batching;
pub mod checkpoint;
mod checks;
pub mod cli;
pub mod comm;
pub mod config;
#[doc(hidden)]
pub mod cuda;
pub mod data;
pub mod device;
pub mod digest;
pub mod engine;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod flow;
pub mod forecast;
mod fs;
mod hostname;
pub mod interrupt;
pub mod model;
pub mod objective;
pub mod observe;
pub mod ops;
pub mod optim;
pub mod params;
pub mod pipeline;
mod plain;
pub mod plan;
pub mod policy;
pub mod pretrain;
pub mod reward;
pub mod rng;
pub mod rollout;
pub mod shard;
pub mod train;
mod variants;

pub use error::{Error, Result};
