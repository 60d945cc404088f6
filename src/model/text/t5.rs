//! The encoder of T5 v1.1 (Raffel et al., arXiv 1910.10683; transformers' `T5EncoderModel`, models/t5/modeling_t5.py of
//! v4.57). Padding is attended to, as Stable Diffusion 3 was trained.

use crate::error::{Error, Result};
use crate::model::bounds::{LAYERS, VOCABULARY, WIDTH, positive, within};
use crate::model::files::Weights;
use crate::model::frozen::{attention, check, embed, load, read_config};
use crate::ops;
use crate::params::{Init, Slot, Spec, SpecList, StageParams};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use std::path::Path;

/// Sizes, in the words of transformers' config.json, which leaves out what has its default value.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct T5Config {
    /// Tokens.
    vocab_size: usize,
    /// Width D.
    d_model: usize,
    /// Features of a head; all heads together need not have the width D.
    d_kv: usize,
    /// Width of the feed-forward layers.
    d_ff: usize,
    /// Blocks.
    num_layers: usize,
    /// Attention heads.
    num_heads: usize,
    /// Classes of distances between tokens, in both directions together.
    relative_attention_num_buckets: usize,
    /// From this distance on all are of one class.
    relative_attention_max_distance: usize,
    /// Inside every norm's square root.
    layer_norm_epsilon: f64,
    /// The kind of feed-forward layer; "gated-gelu" is what v1.1 has.
    feed_forward_proj: String,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "relu".into(),
        }
    }
}

impl T5Config {
    /// The config.json of a `T5EncoderModel` in `folder`.
    ///
    /// # Errors
    /// [`Error::File`]: it cannot be read, is of another model, or of another version of T5.
    fn read(folder: &Path) -> Result<Self> {
        let config: Self = read_config(folder, &["t5"])?;
        let error = |message| Err(Error::File { path: folder.join("config.json"), message });
        if config.feed_forward_proj != "gated-gelu" {
            let kind = &config.feed_forward_proj;
            return error(format!("has feed_forward_proj {kind:?}; only T5 v1.1 with \"gated-gelu\" is supported"));
        }
        let (buckets, distance) = (config.relative_attention_num_buckets, config.relative_attention_max_distance);
        let sizes = [
            ("vocab_size", config.vocab_size, VOCABULARY),
            ("d_model", config.d_model, WIDTH),
            ("d_kv", config.d_kv, WIDTH),
            ("d_ff", config.d_ff, WIDTH),
            ("num_layers", config.num_layers, LAYERS),
            ("num_heads", config.num_heads, WIDTH / config.d_kv.clamp(1, WIDTH)),
            ("relative_attention_num_buckets", buckets, WIDTH),
            ("relative_attention_max_distance", distance, WIDTH),
        ];
        if let Err(message) = within(&sizes).and_then(|()| positive("layer_norm_epsilon", config.layer_norm_epsilon)) {
            return error(message);
        }
        if buckets < 4 || !buckets.is_multiple_of(4) || distance <= buckets / 4 {
            return error(format!("has sizes that make no model: {config:?}"));
        }
        Ok(config)
    }

    /// The class of a distance, key minus query: half of the classes for either direction, of these one half for one
    /// distance each, the other for ranges that grow with its logarithm. f32 as in transformers, so that a distance on a
    /// border falls on the same side.
    fn bucket(&self, distance: i64) -> usize {
        let half = self.relative_attention_num_buckets / 2;
        let exact = half / 2;
        let n = distance.unsigned_abs() as usize;
        let class = if n < exact {
            n
        } else {
            let range = (self.relative_attention_max_distance as f64 / exact as f64).ln() as f32;
            let far = (n as f32 / exact as f32).ln() / range * (half - exact) as f32;
            (exact + far as usize).min(half - 1)
        };
        if distance > 0 { half + class } else { class }
    }
}

/// One block.
#[derive(Debug)]
struct Block {
    norm1: Slot,
    query: Slot,
    key: Slot,
    value: Slot,
    out: Slot,
    norm2: Slot,
    gate: Slot,
    up: Slot,
    down: Slot,
}

impl Block {
    fn new(specs: &mut SpecList, config: &T5Config, index: usize) -> Self {
        let (width, inner, hidden) = (config.d_model, config.num_heads * config.d_kv, config.d_ff);
        let mut linear = |name: &str, from: usize, to: usize| {
            let name = format!("encoder.block.{index}.layer.{name}.weight");
            specs.base(&name, &[to, from], Init::Normal((from as f64).powf(-0.5)))
        };
        let [query, key, value] = ["q", "k", "v"].map(|n| linear(&format!("0.SelfAttention.{n}"), width, inner));
        let out = linear("0.SelfAttention.o", inner, width);
        let [gate, up] = ["wi_0", "wi_1"].map(|n| linear(&format!("1.DenseReluDense.{n}"), width, hidden));
        let down = linear("1.DenseReluDense.wo", hidden, width);
        let [norm1, norm2] = [0, 1].map(|layer| {
            specs.base(&format!("encoder.block.{index}.layer.{layer}.layer_norm.weight"), &[width], Init::Ones)
        });
        Self { norm1, query, key, value, out, norm2, gate, up, down }
    }
}

/// What becomes of texts of T tokens.
#[derive(Debug, Clone)]
pub struct T5Output {
    /// The states `[B, T, D]`: the embedded tokens, then what each block makes of them; without the final norm.
    pub hidden: Vec<Tensor>,
    /// The last states after the final norm, `[B, T, D]`.
    pub last: Tensor,
}

/// The encoder.
#[derive(Debug)]
pub struct T5Encoder {
    config: T5Config,
    places: Places,
    params: StageParams,
}

/// Where the parameters are.
#[derive(Debug)]
struct Places {
    tokens: Slot,
    distances: Slot,
    blocks: Vec<Block>,
    norm: Slot,
}

impl Places {
    /// Declares the parameters; `table` is the name of the table of tokens.
    fn declare(config: &T5Config, table: &str) -> (Self, Vec<Spec>) {
        let mut specs = SpecList::new("", None);
        let tokens = specs.base(table, &[config.vocab_size, config.d_model], Init::Normal(1.0));
        let distances = specs.base(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            &[config.relative_attention_num_buckets, config.num_heads],
            Init::Normal(1.0),
        );
        let blocks = (0..config.num_layers).map(|i| Block::new(&mut specs, config, i)).collect();
        let norm = specs.base("encoder.final_layer_norm.weight", &[config.d_model], Init::Ones);
        (Self { tokens, distances, blocks, norm }, specs.finish())
    }
}

/// The two names of the one table of tokens; files hold either or both.
const TOKENS: [&str; 2] = ["shared.weight", "encoder.embed_tokens.weight"];

/// The name that the files have for the table.
fn table(weights: &Weights) -> &'static str {
    if weights.contains(TOKENS[0]) { TOKENS[0] } else { TOKENS[1] }
}

impl T5Encoder {
    /// Reads config.json and the weights in `folder`, computed in `dtype`: f32 or bf16; T5 overflows in f16.
    ///
    /// # Errors
    /// [`Error::File`]: something is missing, of another model, or not supported.
    pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let config = T5Config::read(folder)?;
        let weights = Weights::open(folder)?;
        let (places, specs) = Places::declare(&config, table(&weights));
        let params = load(&weights, &specs, |name| TOKENS.contains(&name), dtype, device)?;
        Ok(Self { config, places, params })
    }

    /// Whether [`T5Encoder::load`] finds all that it needs in `folder`; no tensor is read.
    ///
    /// # Errors
    /// As there.
    pub fn check_files(folder: &Path) -> Result<()> {
        let weights = Weights::open(folder)?;
        let (_, specs) = Places::declare(&T5Config::read(folder)?, table(&weights));
        check(&weights, &specs, |name| TOKENS.contains(&name))
    }

    /// Width of the states of the encoder in `folder`.
    ///
    /// # Errors
    /// What is wrong with its config.json.
    pub fn width(folder: &Path) -> Result<usize> {
        Ok(T5Config::read(folder)?.d_model)
    }

    /// Tokens that the encoder in `folder` knows.
    ///
    /// # Errors
    /// As [`T5Encoder::width`].
    pub fn vocabulary(folder: &Path) -> Result<usize> {
        Ok(T5Config::read(folder)?.vocab_size)
    }

    /// The tensors of a model of these sizes.
    pub fn specs(config: &T5Config) -> Vec<Spec> {
        Places::declare(config, TOKENS[0]).1
    }

    /// Texts as tokens, all of one length; every token sees all others.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<T5Output> {
        let x = embed(self.params.get(self.places.tokens)?, ids)?; // [B, T, D]
        let bias = self.bias(x.dim(1)?)?;
        let mut hidden = vec![x];
        for block in &self.places.blocks {
            hidden.push(self.block(block, &hidden[hidden.len() - 1], &bias)?);
        }
        let last = self.normalised(&hidden[hidden.len() - 1], self.places.norm)?;
        Ok(T5Output { hidden, last })
    }

    /// x `[B, T, D]` through a block.
    fn block(&self, block: &Block, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let h = self.normalised(x, block.norm1)?;
        let heads = |slot: Slot| -> Result<Tensor> {
            Ok(self.linear(&h, slot)?.reshape((batch, tokens, self.config.num_heads, self.config.d_kv))?)
        };
        let (q, k, v) = (heads(block.query)?, heads(block.key)?, heads(block.value)?);
        let h = attention(&q, &k, &v, 1.0, Some(bias))?; // T5 has its scale in the weights
        let x = (x + self.linear(&h, block.out)?)?;
        let h = self.normalised(&x, block.norm2)?;
        let h = (ops::gelu(&self.linear(&h, block.gate)?)? * self.linear(&h, block.up)?)?;
        Ok((&x + self.linear(&h, block.down)?)?)
    }

    /// What the distance of two tokens adds to their score in every block, `[1, H, T, T]`, f32.
    fn bias(&self, tokens: usize) -> Result<Tensor> {
        let table = self.params.get(self.places.distances)?; // [buckets, H]
        let bucket = |i: usize| self.config.bucket((i % tokens) as i64 - (i / tokens) as i64) as u32;
        let buckets = Tensor::from_iter((0..tokens * tokens).map(bucket), table.device())?;
        let bias = table.index_select(&buckets, 0)?.reshape((tokens, tokens, self.config.num_heads))?;
        Ok(bias.permute((2, 0, 1))?.unsqueeze(0)?.to_dtype(DType::F32)?.contiguous()?)
    }

    fn linear(&self, x: &Tensor, weight: Slot) -> Result<Tensor> {
        Ok(ops::linear(x, self.params.get(weight)?, None)?)
    }

    fn normalised(&self, x: &Tensor, weight: Slot) -> Result<Tensor> {
        Ok(ops::rms_norm(x, self.params.get(weight)?, self.config.layer_norm_epsilon)?)
    }
}
