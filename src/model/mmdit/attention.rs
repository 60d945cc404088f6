//! Attention of both streams together, and of the image stream alone (diffusers `JointAttnProcessor2_0`,
//! models/attention_processor.py of v0.33.1).

use super::{EPS, QkNorm};
use crate::error::Result;
use crate::model::Linear;
use crate::ops;
use crate::params::{Init, Slot, SpecList, StageParams};
use candle_core::Tensor;

/// A stream's queries, keys and values.
struct Projections {
    heads: usize,
    query: Linear,
    key: Linear,
    value: Linear,
    /// Weights of the norms of q and k, where they have one.
    norms: Option<[Slot; 2]>,
}

impl Projections {
    /// Declares `[to_q, to_k, to_v, norm_q, norm_k]` by the names given, for heads and the width of all of them.
    fn new(specs: &mut SpecList, names: [&str; 5], (heads, width): (usize, usize), qk_norm: Option<QkNorm>) -> Self {
        let [query, key, value, query_norm, key_norm] = names;
        Self {
            heads,
            query: Linear::scaled(specs, query, width, width),
            key: Linear::scaled(specs, key, width, width),
            value: Linear::scaled(specs, value, width, width),
            norms: qk_norm.map(|QkNorm::RmsNorm| {
                [query_norm, key_norm].map(|name| specs.base(&format!("{name}.weight"), &[width / heads], Init::Ones))
            }),
        }
    }

    /// x `[B, T, D]` to q, k, v `[B, T, H, d]`; q and k are to be normalised over d where there are [`Self::norms`].
    fn forward(&self, params: &StageParams, x: &Tensor) -> Result<[Tensor; 3]> {
        let (batch, tokens, width) = x.dims3()?;
        let heads = |linear: Linear| -> Result<Tensor> {
            Ok(ops::reshape(&linear.forward(params, x)?, (batch, tokens, self.heads, width / self.heads))?)
        };
        Ok([heads(self.query)?, heads(self.key)?, heads(self.value)?])
    }

    /// The weights of the norms of q and k.
    fn norms<'a>(&self, params: &'a StageParams) -> Result<Option<[&'a Tensor; 2]>> {
        let Some([query, key]) = self.norms else { return Ok(None) };
        Ok(Some([params.get(query)?, params.get(key)?]))
    }
}

/// `[B, T, H, d]` to `[B, T, D]`.
fn merge_heads(x: &Tensor) -> Result<Tensor> {
    let (batch, tokens, heads, dim) = x.dims4()?;
    Ok(ops::reshape(x, (batch, tokens, heads * dim))?)
}

/// Attention over the tokens of both streams, the image's first.
pub(super) struct JointAttention {
    image: Projections,
    text: Projections,
    image_out: Linear,
    text_out: Option<Linear>,
}

impl JointAttention {
    /// Declares `attn.*`; without the text stream's output where that stream ends. Its queries are declared all the same,
    /// as in the checkpoints, and have a gradient, which is zero.
    pub fn new(specs: &mut SpecList, size: (usize, usize), qk_norm: Option<QkNorm>, text_ends: bool) -> Self {
        let width = size.1;
        let image = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.norm_q", "attn.norm_k"];
        let text = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.norm_added_q", "attn.norm_added_k"];
        Self {
            image: Projections::new(specs, image, size, qk_norm),
            text: Projections::new(specs, text, size, qk_norm),
            image_out: Linear::scaled(specs, "attn.to_out.0", width, width),
            text_out: (!text_ends).then(|| Linear::scaled(specs, "attn.to_add_out", width, width)),
        }
    }

    /// (image `[B, T, D]`, text `[B, L, D]`) to what is added to each; nothing to the text where it ends.
    pub fn forward(&self, params: &StageParams, image: &Tensor, text: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let tokens = image.dim(1)?;
        let ([q, k, v], [text_q, text_k, text_v]) =
            (self.image.forward(params, image)?, self.text.forward(params, text)?);
        let (q, k) = match (self.image.norms(params)?, self.text.norms(params)?) {
            (Some(image), Some(text)) => (
                ops::rms_norm_joined([(&q, image[0]), (&text_q, text[0])], EPS)?, // [B, T + L, H, d]
                ops::rms_norm_joined([(&k, image[1]), (&text_k, text[1])], EPS)?,
            ),
            _ => (ops::join(&q, &text_q)?, ops::join(&k, &text_k)?),
        };
        let v = ops::join(&v, &text_v)?;
        let h = merge_heads(&ops::attention(&q, &k, &v)?)?; // [B, T + L, D]
        let (image, text) = ops::split(&h, tokens)?;
        let image = self.image_out.forward(params, &image)?;
        let text = self.text_out.map(|out| out.forward(params, &text));
        Ok((image, text.transpose()?))
    }
}

/// The second attention of a block's image stream, over that stream's tokens only.
pub(super) struct SelfAttention {
    projections: Projections,
    out: Linear,
}

impl SelfAttention {
    /// Declares `attn2.*`.
    pub fn new(specs: &mut SpecList, size: (usize, usize), qk_norm: Option<QkNorm>) -> Self {
        let width = size.1;
        let names = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.norm_q", "attn2.norm_k"];
        Self {
            projections: Projections::new(specs, names, size, qk_norm),
            out: Linear::scaled(specs, "attn2.to_out.0", width, width),
        }
    }

    /// x `[B, T, D]` to what is added to it.
    pub fn forward(&self, params: &StageParams, x: &Tensor) -> Result<Tensor> {
        let [q, k, v] = self.projections.forward(params, x)?;
        let (q, k) = match self.projections.norms(params)? {
            Some(norms) => (ops::rms_norm(&q, norms[0], EPS)?, ops::rms_norm(&k, norms[1], EPS)?),
            None => (q, k),
        };
        self.out.forward(params, &merge_heads(&ops::attention(&q, &k, &v)?)?)
    }
}
