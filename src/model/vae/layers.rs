//! The layers of both halves, on pictures with the channels last `[B, H, W, C]` (diffusers models/resnet.py and
//! models/attention_processor.py of v0.33.1).

use crate::error::Result;
use crate::model::Linear;
use crate::ops::{self, Walk};
use crate::params::{Init, Slot, SpecList, StageParams};
use candle_core::Tensor;

/// Inside every norm's square root.
const EPS: f64 = 1e-6;

/// `[B, H, W, C]` to the same of another size.
pub(super) trait Layer: Send + Sync {
    fn forward(&self, params: &StageParams, x: &Tensor) -> Result<Tensor>;
}

/// A convolution.
#[derive(Debug, Clone, Copy)]
pub(super) struct Convolution {
    weight: Slot,
    bias: Slot,
    walk: Walk,
}

impl Convolution {
    /// Declares a 3 x 3 kernel.
    pub fn new(specs: &mut SpecList, name: &str, c_in: usize, c_out: usize, walk: Walk) -> Self {
        Self::sized(specs, name, 3, (c_in, c_out), walk)
    }

    /// Declares a kernel of one pixel.
    pub fn point(specs: &mut SpecList, name: &str, c_in: usize, c_out: usize) -> Self {
        Self::sized(specs, name, 1, (c_in, c_out), Walk::Same)
    }

    fn sized(specs: &mut SpecList, name: &str, size: usize, (c_in, c_out): (usize, usize), walk: Walk) -> Self {
        let std = ((c_in * size * size) as f64).powf(-0.5);
        Self {
            weight: specs.base(&format!("{name}.weight"), &[c_out, c_in, size, size], Init::Normal(std)),
            bias: specs.base(&format!("{name}.bias"), &[c_out], Init::Zeros),
            walk,
        }
    }

    fn apply(&self, params: &StageParams, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        Ok(ops::convolution(x, params.get(self.weight)?, params.get(self.bias)?, self.walk, residual)?)
    }
}

impl Layer for Convolution {
    fn forward(&self, params: &StageParams, x: &Tensor) -> Result<Tensor> {
        self.apply(params, x, None)
    }
}

/// A group norm, with SiLU after it if wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Norm {
    weight: Slot,
    bias: Slot,
    groups: usize,
    silu: bool,
}

impl Norm {
    pub fn new(specs: &mut SpecList, name: &str, channels: usize, groups: usize, silu: bool) -> Self {
        Self {
            weight: specs.base(&format!("{name}.weight"), &[channels], Init::Ones),
            bias: specs.base(&format!("{name}.bias"), &[channels], Init::Zeros),
            groups,
            silu,
        }
    }
}

impl Layer for Norm {
    fn forward(&self, params: &StageParams, x: &Tensor) -> Result<Tensor> {
        Ok(ops::group_norm(x, params.get(self.weight)?, params.get(self.bias)?, self.groups, EPS, self.silu)?)
    }
}

/// Norm, SiLU, convolution, twice, beside the identity (`ResnetBlock2D`).
#[derive(Debug, Clone, Copy)]
pub(super) struct Resnet {
    first: (Norm, Convolution),
    second: (Norm, Convolution),
    /// In place of the identity where the number of channels changes.
    shortcut: Option<Convolution>,
}

impl Resnet {
    pub fn new(specs: &mut SpecList, name: &str, c_in: usize, c_out: usize, groups: usize) -> Self {
        let mut half = |i: usize, c_in: usize| {
            let norm = Norm::new(specs, &format!("{name}.norm{i}"), c_in, groups, true);
            (norm, Convolution::new(specs, &format!("{name}.conv{i}"), c_in, c_out, Walk::Same))
        };
        Self {
            first: half(1, c_in),
            second: half(2, c_out),
            shortcut: (c_in != c_out).then(|| Convolution::point(specs, &format!("{name}.conv_shortcut"), c_in, c_out)),
        }
    }
}

impl Layer for Resnet {
    fn forward(&self, params: &StageParams, x: &Tensor) -> Result<Tensor> {
        let h = self.first.1.forward(params, &self.first.0.forward(params, x)?)?;
        let normed = self.second.0.forward(params, &h)?;
        drop(h);
        match self.shortcut {
            Some(shortcut) => self.second.1.apply(params, &normed, Some(&shortcut.forward(params, x)?)),
            None => self.second.1.apply(params, &normed, Some(x)),
        }
    }
}

/// Attention of every pixel to every other, in one head, beside the identity.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attention {
    norm: Norm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
}

impl Attention {
    pub fn new(specs: &mut SpecList, name: &str, channels: usize, groups: usize) -> Self {
        let norm = Norm::new(specs, &format!("{name}.group_norm"), channels, groups, false);
        let mut linear = |part: &str| Linear::scaled(specs, &format!("{name}.{part}"), channels, channels);
        Self { norm, query: linear("to_q"), key: linear("to_k"), value: linear("to_v"), out: linear("to_out.0") }
    }
}

impl Layer for Attention {
    fn forward(&self, params: &StageParams, x: &Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let normed = self.norm.forward(params, x)?.reshape((batch, height * width, 1, channels))?; // [B, T, 1, C]
        let [q, k, v] = [self.query, self.key, self.value].map(|linear| linear.forward(params, &normed));
        let attended = ops::attention(&q?, &k?, &v?)?.reshape(x.shape())?;
        Ok((self.out.forward(params, &attended)? + x)?)
    }
}
