//! The two halves as lists of stages (diffusers `Encoder` and `Decoder`, models/autoencoders/vae.py of v0.33.1).

use super::Config;
use super::layers::{Attention, Convolution, Layer, Norm, Resnet};
use crate::error::{Error, Result};
use crate::model::Stage;
use crate::ops::Walk;
use crate::params::{Spec, SpecList, StageParams};
use candle_core::Tensor;

/// Layers one after the other, on one picture tensor `[B, H, W, C]`.
struct Sequence {
    specs: Vec<Spec>,
    layers: Vec<Box<dyn Layer>>,
}

impl Sequence {
    fn stage(specs: SpecList, layers: Vec<Box<dyn Layer>>) -> Box<dyn Stage> {
        Box::new(Self { specs: specs.finish(), layers })
    }

    /// A convolution alone.
    fn convolution(make: impl FnOnce(&mut SpecList) -> Convolution) -> Box<dyn Stage> {
        let mut specs = SpecList::new("", None);
        let layer = make(&mut specs);
        Self::stage(specs, vec![Box::new(layer)])
    }
}

impl Stage for Sequence {
    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x] = inputs else {
            return Err(Error::Failed(format!("a stage of the autoencoder takes 1 input, not {}", inputs.len())));
        };
        let mut x = x.clone();
        for layer in &self.layers {
            x = layer.forward(params, &x)?;
        }
        Ok(vec![x])
    }
}

/// Picture `[B, H, W, 3]` in [-1, 1] to `[B, h, w, 2 latent_channels]`: the mean and the logarithm of the variance.
pub(super) fn encoder(config: &Config) -> Vec<Box<dyn Stage>> {
    let (channels, groups, moments) = (&config.block_out_channels, config.norm_num_groups, 2 * config.latent_channels);
    let (first, last) = ends(channels);
    let mut stages = vec![Sequence::convolution(|s| Convolution::new(s, "encoder.conv_in", 3, first, Walk::Same))];
    let mut c_in = first;
    for (i, &c_out) in channels.iter().enumerate() {
        let mut specs = SpecList::new(format!("encoder.down_blocks.{i}."), None);
        let mut layers = resnets(&mut specs, config.layers_per_block, (c_in, c_out), groups);
        if i + 1 < channels.len() {
            layers.push(Box::new(Convolution::new(&mut specs, "downsamplers.0.conv", c_out, c_out, Walk::Half)));
        }
        stages.push(Sequence::stage(specs, layers));
        c_in = c_out;
    }
    stages.push(middle("encoder.mid_block.", last, groups));
    stages.push(end("encoder.", (last, moments), groups));
    if config.use_quant_conv {
        stages.push(Sequence::convolution(|s| Convolution::point(s, "quant_conv", moments, moments)));
    }
    stages
}

/// Latent `[B, h, w, latent_channels]` to a picture `[B, H, W, 3]` in about [-1, 1].
pub(super) fn decoder(config: &Config) -> Vec<Box<dyn Stage>> {
    let (channels, groups, latent) = (&config.block_out_channels, config.norm_num_groups, config.latent_channels);
    let (first, last) = ends(channels);
    let mut stages = Vec::new();
    if config.use_post_quant_conv {
        stages.push(Sequence::convolution(|s| Convolution::point(s, "post_quant_conv", latent, latent)));
    }
    stages.push(Sequence::convolution(|s| Convolution::new(s, "decoder.conv_in", latent, last, Walk::Same)));
    stages.push(middle("decoder.mid_block.", last, groups));
    let mut c_in = last;
    for (i, &c_out) in channels.iter().rev().enumerate() {
        let mut specs = SpecList::new(format!("decoder.up_blocks.{i}."), None);
        let mut layers = resnets(&mut specs, config.layers_per_block + 1, (c_in, c_out), groups);
        if i + 1 < channels.len() {
            layers.push(Box::new(Convolution::new(&mut specs, "upsamplers.0.conv", c_out, c_out, Walk::Double)));
        }
        stages.push(Sequence::stage(specs, layers));
        c_in = c_out;
    }
    stages.push(end("decoder.", (first, 3), groups));
    stages
}

/// Channels at the picture's size and at the latent's.
fn ends(channels: &[usize]) -> (usize, usize) {
    (channels.first().copied().unwrap_or_default(), channels.last().copied().unwrap_or_default())
}

fn resnets(specs: &mut SpecList, count: usize, (c_in, c_out): (usize, usize), groups: usize) -> Vec<Box<dyn Layer>> {
    let mut layers: Vec<Box<dyn Layer>> = Vec::with_capacity(count + 1);
    for i in 0..count {
        let c_in = if i == 0 { c_in } else { c_out };
        layers.push(Box::new(Resnet::new(specs, &format!("resnets.{i}"), c_in, c_out, groups)));
    }
    layers
}

/// Residual layer, attention, residual layer, at the latent's size.
fn middle(prefix: &str, channels: usize, groups: usize) -> Box<dyn Stage> {
    let mut specs = SpecList::new(prefix, None);
    let resnet = |specs: &mut SpecList, i| Resnet::new(specs, &format!("resnets.{i}"), channels, channels, groups);
    let before = resnet(&mut specs, 0);
    let attention = Attention::new(&mut specs, "attentions.0", channels, groups);
    let after = resnet(&mut specs, 1);
    Sequence::stage(specs, vec![Box::new(before), Box::new(attention), Box::new(after)])
}

/// Norm, SiLU, convolution.
fn end(prefix: &str, (c_in, c_out): (usize, usize), groups: usize) -> Box<dyn Stage> {
    let mut specs = SpecList::new(prefix, None);
    let norm = Norm::new(&mut specs, "conv_norm_out", c_in, groups, true);
    let convolution = Convolution::new(&mut specs, "conv_out", c_in, c_out, Walk::Same);
    Sequence::stage(specs, vec![Box::new(norm), Box::new(convolution)])
}
