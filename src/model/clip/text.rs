//! The tower of texts.

use super::block::{Block, Sizes};
use super::config::TextConfig;
use super::is_buffer;
use crate::error::{Error, Result};
use crate::model::files::Weights;
use crate::model::frozen::{LayerNorm, check, embed, load};
use crate::ops;
use crate::params::{Init, Slot, Spec, SpecList, StageParams};
use candle_core::{DType, Device, Tensor};
use std::path::Path;

/// What becomes of texts of T tokens.
#[derive(Debug, Clone)]
pub struct TextOutput {
    /// The states `[B, T, D]`: the embedded tokens, then what each block makes of them; without the final norm.
    pub hidden: Vec<Tensor>,
    /// The last states after the final norm, `[B, T, D]`.
    pub last: Tensor,
    /// Of each text, its end token's last state, projected: `[B, projection_dim]`, not normalised.
    pub features: Tensor,
}

impl TextOutput {
    /// The states that go into the last block, `[B, T, D]`: what diffusion models are conditioned on.
    pub fn penultimate(&self) -> &Tensor {
        &self.hidden[self.hidden.len() - 2]
    }
}

/// The tower's structure; its parameters are given to it.
#[derive(Debug)]
pub(super) struct TextTower {
    config: TextConfig,
    tokens: Slot,
    positions: Slot,
    blocks: Vec<Block>,
    norm: LayerNorm,
    projection: Slot,
}

impl TextTower {
    /// Declares `text_model.*` and `text_projection.weight`.
    pub fn new(specs: &mut SpecList, config: &TextConfig, features: usize) -> Self {
        let width = config.hidden_size;
        let sizes = Sizes {
            width,
            hidden: config.intermediate_size,
            heads: config.num_attention_heads,
            activation: config.hidden_act,
            eps: config.layer_norm_eps,
        };
        let mut table = |name: &str, rows, std| {
            specs.base(&format!("text_model.embeddings.{name}_embedding.weight"), &[rows, width], Init::Normal(std))
        };
        Self {
            config: config.clone(),
            tokens: table("token", config.vocab_size, 1.0),
            positions: table("position", config.max_position_embeddings, 1.0),
            blocks: (0..config.num_hidden_layers).map(|i| Block::new(specs, "text_model", i, sizes)).collect(),
            norm: LayerNorm::new(specs, "text_model.final_layer_norm", width, config.layer_norm_eps),
            projection: specs.base(
                "text_projection.weight",
                &[features, width],
                Init::Normal((width as f64).powf(-0.5)),
            ),
        }
    }

    /// Texts of T tokens each. A token sees itself and those before it, so what pads a text behind its end token does
    /// not change its features, and no mask of it is needed.
    pub fn forward(&self, params: &StageParams, ids: &[Vec<u32>]) -> Result<TextOutput> {
        let x = embed(params.get(self.tokens)?, ids)?; // [B, T, D]
        let (tokens, longest) = (x.dim(1)?, self.config.max_position_embeddings);
        if tokens > longest {
            return Err(Error::Failed(format!("a text of {tokens} tokens is longer than the model takes, {longest}")));
        }
        let x = x.broadcast_add(&params.get(self.positions)?.narrow(0, 0, tokens)?)?;
        let mask = causal_mask(tokens, x.device())?;
        let mut hidden = vec![x];
        for block in &self.blocks {
            hidden.push(block.forward(params, &hidden[hidden.len() - 1], Some(&mask))?);
        }
        let last = self.norm.forward(params, &hidden[hidden.len() - 1])?;
        let rows = ids.iter().enumerate().map(|(text, ids)| (text * tokens + self.config.end(ids)) as u32);
        let rows = Tensor::from_iter(rows, last.device())?;
        let ends = last.flatten_to(1)?.index_select(&rows, 0)?; // [B, D]
        let features = ops::linear(&ends, params.get(self.projection)?, None)?;
        Ok(TextOutput { hidden, last, features })
    }
}

/// `[T, T]`: minus infinity where a token would see one behind it.
fn causal_mask(tokens: usize, device: &Device) -> Result<Tensor> {
    let value = |i: usize| if i % tokens > i / tokens { f32::NEG_INFINITY } else { 0.0 };
    Ok(Tensor::from_iter((0..tokens * tokens).map(value), device)?.reshape((tokens, tokens))?)
}

/// The tower alone: transformers' `CLIPTextModelWithProjection`.
#[derive(Debug)]
pub struct TextEncoder {
    tower: TextTower,
    params: StageParams,
}

impl TextEncoder {
    /// Reads config.json and the weights in `folder`, computed in `dtype`, f32 or bf16.
    ///
    /// # Errors
    /// [`Error::File`]: something is missing, of another model, or not supported.
    pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let (tower, specs) = Self::declare(&TextConfig::read(folder)?);
        let params = load(&Weights::open(folder)?, &specs, is_buffer, dtype, device)?;
        Ok(Self { tower, params })
    }

    /// Whether [`TextEncoder::load`] finds all that it needs in `folder`; no tensor is read.
    ///
    /// # Errors
    /// As there.
    pub fn check_files(folder: &Path) -> Result<()> {
        check(&Weights::open(folder)?, &Self::specs(&TextConfig::read(folder)?), is_buffer)
    }

    /// The tensors of a model of these sizes.
    pub fn specs(config: &TextConfig) -> Vec<Spec> {
        Self::declare(config).1
    }

    fn declare(config: &TextConfig) -> (TextTower, Vec<Spec>) {
        let mut specs = SpecList::new("", None);
        let tower = TextTower::new(&mut specs, config, config.projection_dim);
        (tower, specs.finish())
    }

    /// Texts as tokens, all of one length.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<TextOutput> {
        self.tower.forward(&self.params, ids)
    }
}
