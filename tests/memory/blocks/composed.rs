//! The same model as one graph of candle's own operations: what a program without this library's would run, and a second
//! opinion on its gradients. Only the blocks; the first and the last stage have hardly an operation of ours.

use candle_core::{D, Tensor};
use candle_nn::ops::softmax;
use flowrl_dist::Result;
use flowrl_dist::model::{Model, Stage};
use flowrl_dist::params::{LoraConfig, ParamSet, StageParams};

const HEADS: usize = 6;
const EPS: f64 = 1e-6;

/// A block's parameters by the ends of their names.
struct Block<'a> {
    stage: &'a dyn Stage,
    params: &'a StageParams,
}

impl Block<'_> {
    fn find(&self, end: &str) -> Option<&Tensor> {
        let slot = self.stage.specs().iter().position(|spec| spec.name.ends_with(end))?;
        self.params.iter().find(|(of, _)| *of == slot).map(|(_, tensor)| tensor)
    }

    fn get(&self, end: &str) -> &Tensor {
        self.find(end).unwrap_or_else(|| panic!("no parameter {end}"))
    }

    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let product = |weight: &Tensor, x: &Tensor| x.broadcast_matmul(&weight.t()?);
        let y = product(self.get(&format!("{name}.weight")), x)?.broadcast_add(self.get(&format!("{name}.bias")))?;
        let factor = |which: &str| self.find(&format!("{name}.lora_{which}.weight"));
        let (Some(a), Some(b)) = (factor("A"), factor("B")) else { return Ok(y) };
        let LoraConfig { rank, alpha, .. } = LoraConfig::default();
        Ok((y + (product(b, &product(a, x)?)? * (alpha / rank as f64))?)?)
    }

    /// x `[B, T, H, d]` over its root mean square, times the weight.
    fn rms_norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let root = (x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
        Ok(x.broadcast_div(&root)?.broadcast_mul(self.get(&format!("{name}.weight")))?)
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x, vector] = inputs else { panic!("a block takes 2 inputs") };
        let (batch, tokens, width) = x.dims3()?;
        let silu = (vector / ((vector.neg()?.exp()? + 1.0)?))?;
        let m = self.linear("norm1.linear", &silu)?.unsqueeze(1)?.chunk(6, 2)?; // 6 x [B, 1, D]
        let by_head = |y: Tensor| y.reshape((batch, tokens, HEADS, width / HEADS));

        let h = modulated(x, &m[0], &m[1])?;
        let q = self.rms_norm("attn.norm_q", &by_head(self.linear("attn.to_q", &h)?)?)?;
        let k = self.rms_norm("attn.norm_k", &by_head(self.linear("attn.to_k", &h)?)?)?;
        let v = by_head(self.linear("attn.to_v", &h)?)?;
        let [q, k, v] = [q, k, v].map(|t| t.transpose(1, 2)?.contiguous()); // [B, H, T, d]
        let logits = (q?.matmul(&k?.t()?)? * ((width / HEADS) as f64).powf(-0.5))?;
        let h = softmax(&logits, D::Minus1)?.matmul(&v?)?.transpose(1, 2)?.reshape((batch, tokens, width))?;
        let x = (x + self.linear("attn.to_out.0", &h)?.broadcast_mul(&m[2])?)?;

        let h = self.linear("ff.net.0.proj", &modulated(&x, &m[3], &m[4])?)?.gelu()?;
        let x = (&x + self.linear("ff.net.2", &h)?.broadcast_mul(&m[5])?)?;
        Ok(vec![x, vector.clone()])
    }
}

/// LayerNorm(x) (1 + scale) + shift.
fn modulated(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let x = x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?)?;
    Ok(x.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)?)
}

/// The velocity `[B, C, H, W]`, with the graph of the whole model behind it.
pub fn velocity(model: &Model, params: &ParamSet, mut io: Vec<Tensor>) -> Result<Tensor> {
    for (index, stage) in model.stages.iter().enumerate() {
        let (stage, params) = (&**stage, params.stage(index));
        let is_block = stage.specs().iter().any(|spec| spec.name.starts_with("transformer_blocks."));
        io = if is_block { Block { stage, params }.forward(&io)? } else { stage.forward(params, &io)? };
    }
    Ok(io.remove(0))
}
