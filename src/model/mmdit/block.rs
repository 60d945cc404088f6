//! A joint block (diffusers `JointTransformerBlock`, models/attention.py of v0.33.1).

use super::attention::{JointAttention, SelfAttention};
use super::{Config, EPS, Mlp, exactly, modulations, norm_continuous};
use crate::error::Result;
use crate::model::{Linear, Stage};
use crate::ops::{self, Wanted};
use crate::params::{Init, LoraConfig, Spec, SpecList, StageParams};
use candle_core::Tensor;

/// Attention and feed-forward of both streams, each modulated and gated (adaLN-Zero, models/normalization.py).
pub(super) struct Block {
    specs: Vec<Spec>,
    /// Six modulations, nine with a second attention (`SD35AdaLayerNormZeroX`).
    image_modulation: Linear,
    /// Six modulations, two where the text stream ends (`AdaLayerNormContinuous`).
    text_modulation: Linear,
    attention: JointAttention,
    second_attention: Option<SelfAttention>,
    image_feed_forward: Mlp,
    /// None where the text stream ends.
    text_feed_forward: Option<Mlp>,
}

impl Block {
    pub fn new(config: &Config, index: usize, lora: Option<&LoraConfig>) -> Self {
        let (heads, width) = (config.num_attention_heads, config.width());
        let (dual, text_ends) = (config.dual_attention_layers.contains(&index), index + 1 == config.num_layers);
        let mut specs = SpecList::new(format!("transformer_blocks.{index}."), lora);
        let s = &mut specs;
        let feed_forward = (width, 4 * width, width);
        Self {
            image_modulation: modulation(s, "norm1.linear", width, if dual { 9 } else { 6 }),
            text_modulation: modulation(s, "norm1_context.linear", width, if text_ends { 2 } else { 6 }),
            attention: JointAttention::new(s, (heads, width), config.qk_norm, text_ends),
            second_attention: dual.then(|| SelfAttention::new(s, (heads, width), config.qk_norm)),
            image_feed_forward: Mlp::new(s, ["ff.net.0.proj", "ff.net.2"], feed_forward),
            text_feed_forward: (!text_ends)
                .then(|| Mlp::new(s, ["ff_context.net.0.proj", "ff_context.net.2"], feed_forward)),
            specs: specs.finish(),
        }
    }
}

fn modulation(specs: &mut SpecList, name: &str, width: usize, count: usize) -> Linear {
    Linear::new(specs, name, width, count * width, Init::Zeros)
}

impl Stage for Block {
    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// (image `[B, T, D]`, text `[B, L, D]`, conditioning vector `[B, D]`) -> the same, without the text where it ends.
    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.run(params, inputs, Wanted::Value)
    }

    fn graph(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.run(params, inputs, Wanted::Gradient)
    }
}

impl Block {
    fn run(&self, params: &StageParams, inputs: &[Tensor], wanted: Wanted) -> Result<Vec<Tensor>> {
        let [image, text, vector] = exactly(inputs, "joint block")?;
        let activated = ops::silu(vector)?; // [B, D]
        // Of the attention shift, scale, gate; of the feed-forward shift, scale, gate; of the second attention the same.
        let count = if self.second_attention.is_some() { 9 } else { 6 };
        let m = modulations(self.image_modulation, params, &activated, count)?;
        let count = if self.text_feed_forward.is_some() { 6 } else { 2 };
        let c = modulations(self.text_modulation, params, &activated, count)?;

        let image_in = ops::layer_norm_modulate(image, &m[0], &m[1], EPS)?;
        let text_in = match self.text_feed_forward {
            Some(_) => ops::layer_norm_modulate(text, &c[0], &c[1], EPS)?,
            None => norm_continuous(text, &c)?,
        };
        let (image_out, text_out) = self.attention.forward(params, &image_in, &text_in)?;

        let mut h = ops::gated_residual(image, &m[2], &image_out)?;
        if let Some(attention) = &self.second_attention {
            // On the block's input, not on what the first attention made of it.
            let image_in = ops::layer_norm_modulate(image, &m[6], &m[7], EPS)?;
            h = ops::gated_residual(&h, &m[8], &attention.forward(params, &image_in)?)?;
        }
        let image = fed_forward(self.image_feed_forward, params, &h, &m[3..6], wanted)?;

        let (Some(text_out), Some(feed_forward)) = (text_out, self.text_feed_forward) else {
            return Ok(vec![image, vector.clone()]);
        };
        let h = ops::gated_residual(text, &c[2], &text_out)?;
        let text = fed_forward(feed_forward, params, &h, &c[3..6], wanted)?;
        Ok(vec![image, text, vector.clone()])
    }
}

/// x `[B, T, D]` plus its feed-forward layer, which is modulated by shift, scale and gate, each `[B, D]`.
fn fed_forward(mlp: Mlp, params: &StageParams, x: &Tensor, m: &[Tensor], wanted: Wanted) -> Result<Tensor> {
    let h = ops::layer_norm_modulate(x, &m[0], &m[1], EPS)?;
    mlp.first.feed_forward_onto(&mlp.second, params, (x, &m[2]), &h, wanted)
}
