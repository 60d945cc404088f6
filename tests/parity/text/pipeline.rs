//! A pipeline folder with small encoders: recorded CLIPs and tokenizers, a T5 of made-up weights.

use candle_core::{DType, Device, Tensor};
use flowrl_dist::model::text::Encoding;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Widths of the two CLIPs together are 72.
pub const T5_WIDTH: usize = 80;
pub const T5_TOKENS: usize = 12;

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub struct Pipeline(TempDir);

impl Pipeline {
    pub fn new() -> Self {
        let pipeline = Self(tempfile::tempdir().unwrap());
        for (from, to) in [
            ("clip_l_micro", "text_encoder"),
            ("clip_g_micro", "text_encoder_2"),
            ("tokenizers_micro/tokenizer", "tokenizer"),
            ("tokenizers_micro/tokenizer_2", "tokenizer_2"),
            ("tokenizers_micro/tokenizer_3", "tokenizer_3"),
        ] {
            copy(&fixture(from), &pipeline.path(to));
        }
        fs::create_dir(pipeline.path("text_encoder_3")).unwrap();
        let config = format!(
            r#"{{"model_type": "t5", "d_model": {T5_WIDTH}, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3,
                "vocab_size": 110, "feed_forward_proj": "gated-gelu"}}"#
        );
        fs::write(pipeline.path("text_encoder_3/config.json"), config).unwrap();
        save(&pipeline.path("text_encoder_3/model.safetensors"), &t5());
        fs::create_dir(pipeline.path("transformer")).unwrap();
        let config = fs::read_to_string(fixture("sd3_micro/config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
        config["joint_attention_dim"] = T5_WIDTH.into();
        fs::write(pipeline.path("transformer/config.json"), config.to_string()).unwrap();
        pipeline
    }

    pub fn path(&self, part: &str) -> PathBuf {
        self.0.path().join(part)
    }

    pub fn encoding(&self) -> Encoding {
        Encoding { folder: self.0.path().to_path_buf(), t5_tokens: T5_TOKENS, dtype: DType::F32 }
    }

    pub fn remove(&self, part: &str) {
        fs::remove_dir_all(self.path(part)).unwrap();
    }

    /// Changes the weights of an encoder.
    pub fn change_weights(&self, encoder: &str, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
        let path = self.path(encoder).join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        change(&mut tensors);
        save(&path, &tensors);
    }

    /// Changes one setting of an encoder.
    pub fn change_config(&self, encoder: &str, key: &str, value: impl Into<serde_json::Value>) {
        let path = self.path(encoder).join("config.json");
        let mut config: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        config[key] = value.into();
        fs::write(path, config.to_string()).unwrap();
    }
}

pub fn save(path: &Path, tensors: &HashMap<String, Tensor>) {
    candle_core::safetensors::save(tensors, path).unwrap();
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let from = entry.unwrap().path();
        fs::copy(&from, to.join(from.file_name().unwrap())).unwrap();
    }
}

/// The weights of T5 by name.
fn t5() -> HashMap<String, Tensor> {
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("shared.weight".into(), vec![110, T5_WIDTH]),
        ("encoder.final_layer_norm.weight".into(), vec![T5_WIDTH]),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight".into(), vec![32, 3]),
    ];
    for block in 0..2 {
        for (name, shape) in [
            ("0.SelfAttention.q", vec![12, T5_WIDTH]),
            ("0.SelfAttention.k", vec![12, T5_WIDTH]),
            ("0.SelfAttention.v", vec![12, T5_WIDTH]),
            ("0.SelfAttention.o", vec![T5_WIDTH, 12]),
            ("0.layer_norm", vec![T5_WIDTH]),
            ("1.DenseReluDense.wi_0", vec![24, T5_WIDTH]),
            ("1.DenseReluDense.wi_1", vec![24, T5_WIDTH]),
            ("1.DenseReluDense.wo", vec![T5_WIDTH, 24]),
            ("1.layer_norm", vec![T5_WIDTH]),
        ] {
            shapes.push((format!("encoder.block.{block}.layer.{name}.weight"), shape));
        }
    }
    let tensor = |(seed, (name, shape)): (usize, (String, Vec<usize>))| {
        let len = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..len).map(|i| ((seed * 131 + i) as f32 * 1.7).sin() * 0.3).collect();
        (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}
