//! Which sizes there are, as the config.json files of diffusers and transformers.

use candle_core::DType;
use serde_json::{Value, json};

/// A size of the whole model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Size {
    /// 0.9 M parameters with all its parts, f32.
    Tiny,
    /// Stable Diffusion 3.5 Medium, bf16, 5 GB: its text encoders have the right widths, but one or two layers.
    Medium,
}

/// A config.json for each part.
pub(super) struct Configs {
    pub transformer: Value,
    pub vae: Value,
    pub clip_l: Value,
    pub clip_g: Value,
    pub t5: Value,
}

impl Size {
    /// The type of the weights in the files.
    pub(super) fn dtype(self) -> DType {
        match self {
            Size::Tiny => DType::F32,
            Size::Medium => DType::BF16,
        }
    }

    /// Tokens of the CLIP encoders.
    pub(super) fn clip_vocabulary(self) -> u32 {
        match self {
            Size::Tiny => 514,
            Size::Medium => 49408,
        }
    }

    pub(super) fn configs(self) -> Configs {
        let vocabulary = self.clip_vocabulary();
        match self {
            Size::Tiny => Configs {
                transformer: transformer(3, (2, 32), (64, 64), (16, 16), &[0]),
                vae: vae(&[16, 16, 32, 32], 1, 4),
                clip_l: clip((32, 64), (2, 2), 32, "quick_gelu", vocabulary),
                clip_g: clip((32, 64), (2, 2), 32, "gelu", vocabulary),
                t5: t5(64, (4, 16), 128, 2),
            },
            Size::Medium => Configs {
                transformer: transformer(24, (24, 64), (4096, 2048), (128, 384), &(0..13).collect::<Vec<_>>()),
                vae: vae(&[128, 256, 512, 512], 2, 32),
                clip_l: clip((768, 3072), (12, 2), 768, "quick_gelu", vocabulary),
                clip_g: clip((1280, 5120), (20, 2), 1280, "gelu", vocabulary),
                t5: t5(4096, (64, 64), 256, 1),
            },
        }
    }
}

/// Layers, (heads, features of a head), (width of the text, of the pooled text), (sample size, largest position), and the
/// layers with a second attention.
fn transformer(
    layers: usize,
    (heads, head): (usize, usize),
    (text, pooled): (usize, usize),
    (sample, positions): (usize, usize),
    dual: &[usize],
) -> Value {
    json!({
        "_class_name": "SD3Transformer2DModel", "patch_size": 2, "in_channels": 16, "out_channels": 16,
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head,
        "joint_attention_dim": text, "pooled_projection_dim": pooled, "caption_projection_dim": heads * head,
        "sample_size": sample, "pos_embed_max_size": positions, "dual_attention_layers": dual, "qk_norm": "rms_norm",
    })
}

fn vae(channels: &[usize], layers: usize, groups: usize) -> Value {
    let blocks = |kind: &'static str| vec![kind; channels.len()];
    json!({
        "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3, "latent_channels": 16,
        "block_out_channels": channels, "layers_per_block": layers, "norm_num_groups": groups,
        "down_block_types": blocks("DownEncoderBlock2D"), "up_block_types": blocks("UpDecoderBlock2D"),
        "mid_block_add_attention": true, "use_quant_conv": false, "use_post_quant_conv": false,
        "scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024,
    })
}

/// (Width, width of the MLPs), (heads, layers), features, activation, tokens.
fn clip(
    (width, hidden): (usize, usize),
    (heads, layers): (usize, usize),
    features: usize,
    activation: &str,
    vocabulary: u32,
) -> Value {
    json!({
        "model_type": "clip_text_model", "architectures": ["CLIPTextModelWithProjection"], "vocab_size": vocabulary,
        "hidden_size": width, "intermediate_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers,
        "projection_dim": features, "hidden_act": activation, "max_position_embeddings": 77, "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": 1,
    })
}

/// Width, (heads, features of a head), width of the MLPs, layers.
fn t5(width: usize, (heads, head): (usize, usize), hidden: usize, layers: usize) -> Value {
    json!({
        "model_type": "t5", "architectures": ["T5EncoderModel"], "feed_forward_proj": "gated-gelu", "vocab_size": 259,
        "d_model": width, "d_kv": head, "d_ff": hidden, "num_layers": layers, "num_heads": heads,
    })
}
