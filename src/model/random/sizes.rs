//! Which sizes there are, as the config.json files of diffusers and transformers.

use crate::model::mmdit::Config;
use candle_core::DType;
use serde_json::{Value, json};

/// A size of the whole model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Size {
    /// 0.9 M parameters with all its parts, f32; the layout of Stable Diffusion 3.5 Medium.
    Tiny,
    /// Stable Diffusion 3.5 Medium, bf16, 5 GB: its text encoders have the right widths, but one or two layers.
    Medium,
    /// 0.9 M parameters with all its parts, f32; the layout of Stable Diffusion 3.5 Large.
    LargeTiny,
    /// Stable Diffusion 3.5 Large, bf16, 17 GB; text encoders as with medium.
    Large,
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
    fn is_tiny(self) -> bool {
        matches!(self, Size::Tiny | Size::LargeTiny)
    }

    /// The type of the weights in the files.
    pub(super) fn dtype(self) -> DType {
        if self.is_tiny() { DType::F32 } else { DType::BF16 }
    }

    /// Tokens of the CLIP encoders.
    pub(super) fn clip_vocabulary(self) -> u32 {
        if self.is_tiny() { 514 } else { 49408 }
    }

    pub(super) fn configs(self) -> Configs {
        let vocabulary = self.clip_vocabulary();
        let transformer = match self {
            Size::Tiny => tiny_transformer(16, &[0]),
            Size::LargeTiny => tiny_transformer(24, &[]),
            Size::Medium => Config::sd35_medium().to_json(),
            Size::Large => Config::sd35_large().to_json(),
        };
        match self.is_tiny() {
            true => Configs {
                transformer,
                vae: vae(&[16, 16, 32, 32], 1, 4),
                clip_l: clip((32, 64), (2, 2), 32, "quick_gelu", vocabulary),
                clip_g: clip((32, 64), (2, 2), 32, "gelu", vocabulary),
                t5: t5(64, (4, 16), 128, 2),
            },
            false => Configs {
                transformer,
                vae: vae(&[128, 256, 512, 512], 2, 32),
                clip_l: clip((768, 3072), (12, 2), 768, "quick_gelu", vocabulary),
                clip_g: clip((1280, 5120), (20, 2), 1280, "gelu", vocabulary),
                t5: t5(4096, (64, 64), 256, 1),
            },
        }
    }
}

/// Three blocks of two heads; the side of the table of positions, and the blocks with a second attention.
fn tiny_transformer(positions: usize, dual: &[usize]) -> Value {
    let sizes = Config {
        num_layers: 3,
        num_attention_heads: 2,
        attention_head_dim: 32,
        joint_attention_dim: 64,
        caption_projection_dim: 64,
        pooled_projection_dim: 64,
        sample_size: 16,
        pos_embed_max_size: positions,
        dual_attention_layers: dual.to_vec(),
        ..Config::sd35_medium()
    };
    sizes.to_json()
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
