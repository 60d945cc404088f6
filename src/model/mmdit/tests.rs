//! What can be said of the model without weights.

use super::*;
use crate::engine::velocity;
use crate::params::{Layout, ParamSet, Role, Trainable};
use crate::rng::{Purpose, Stream};
use candle_core::{DType, Device};

fn lora() -> LoraConfig {
    LoraConfig { targets: LORA_TARGETS.map(String::from).to_vec(), ..LoraConfig::default() }
}

#[test]
fn the_first_medium_model_has_its_parameters_and_adapters() -> Result<()> {
    let model = model(&Config::sd3_medium(), (64, 64), Some(&lora()))?;
    let specs = model.specs();
    assert_eq!(Layout::new(&specs, Trainable::Full).total, 2_028_328_000);
    assert_eq!(Layout::new(&specs, Trainable::Lora).entries.len(), 2 * 191);
    Ok(())
}

/// transformer/config.json of stabilityai/stable-diffusion-3.5-large.
const LARGE_JSON: &str = r#"{"_class_name": "SD3Transformer2DModel", "attention_head_dim": 64,
    "caption_projection_dim": 2432, "in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 38,
    "num_layers": 38, "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
    "qk_norm": "rms_norm", "sample_size": 128}"#;

const MEDIUM_JSON: &str = r#"{"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.31.0", "attention_head_dim": 64,
    "caption_projection_dim": 1536, "dual_attention_layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    "in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16,
    "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
    "sample_size": 128}"#;

#[test]
fn the_medium_model_has_its_parameters_and_adapters() -> Result<()> {
    let model = model(&Config::sd35_medium(), (64, 64), Some(&lora()))?;
    let specs = model.specs();
    assert_eq!(model.stages.len(), 26);
    assert_eq!(Layout::new(&specs, Trainable::Full).total, 2_243_171_520);
    let adapters = Layout::new(&specs, Trainable::Lora);
    let names: Vec<_> = adapters.entries.iter().filter_map(|e| e.name.strip_suffix(".lora_A.weight")).collect();
    assert_eq!((names.len(), adapters.entries.len()), (191, 382));
    assert!(names.iter().all(|n| n.contains(".attn.")));
    assert!(!names.contains(&"transformer_blocks.23.attn.to_add_out"));
    // Each: 32 x (1536 + 1536).
    assert_eq!(adapters.total, 191 * 32 * 3072);
    let fixed: Vec<_> = specs.iter().flat_map(|s| s.iter()).filter(|s| s.role == Role::Buffer).collect();
    assert_eq!((fixed.len(), fixed[0].name.as_str()), (1, "pos_embed.pos_embed"));
    assert_eq!(fixed[0].shape, [1, 384 * 384, 1536]);
    Ok(())
}

/// Parameters as torch counts them in diffusers' model of these sizes.
#[test]
fn the_large_model_has_its_parameters_and_adapters() -> Result<()> {
    let model = model(&Config::sd35_large(), (64, 64), Some(&lora()))?;
    let specs = model.specs();
    assert_eq!(Layout::new(&specs, Trainable::Full).total, 8_056_627_520);
    assert!(specs.iter().flat_map(|s| s.iter()).all(|spec| !spec.name.contains("attn2")));
    // Each: 32 x (2432 + 2432); the last block has no output of the text.
    let adapters = Layout::new(&specs, Trainable::Lora);
    assert_eq!((adapters.entries.len(), adapters.total), (2 * 303, 303 * 32 * 4864));
    Ok(())
}

#[test]
fn a_model_is_told_by_its_layout() {
    for release in RELEASES {
        let found = Config { num_layers: 14, ..(release.sizes)() }.release().map(|release| release.kind);
        assert_eq!(found, Some(release.kind));
    }
}

#[test]
fn a_diffusers_config_is_read() {
    assert_eq!(Config::parse(MEDIUM_JSON), Ok(Config::sd35_medium()));
    assert_eq!(Config::parse(LARGE_JSON), Ok(Config::sd35_large()));
    for config in [Config::sd35_medium(), Config::sd35_large(), Config::sd3_medium()] {
        assert_eq!(Config::parse(&config.to_json().to_string()), Ok(config));
    }
    let error = |from: &str, to: &str| Config::parse(&MEDIUM_JSON.replace(from, to)).expect_err("a wrong config");
    assert!(error("\"rms_norm\"", "\"layer_norm\"").starts_with("has qk_norm = \"layer_norm\", not \"rms_norm\""));
    assert!(error("SD3Tr", "FluxTr").contains("_class_name"));
    assert!(error("\"num_layers\": 24,", "").contains("num_layers"));
    assert!(error("\"caption_projection_dim\": 1536", "\"caption_projection_dim\": 1152").contains("not 1536"));
    assert!(error("\"out_channels\": 16", "\"out_channels\": 32").contains("out_channels = 32, not 16"));
    assert!(error("\"patch_size\": 2", "\"patch_size\": 0").contains("has patch_size = 0;"));
    assert!(error("}", "").contains("not JSON"));
}

#[test]
fn a_latent_that_does_not_fit_is_refused() {
    let config = Config::sd35_medium();
    for latent in [(64, 63), (0, 64), (770, 64)] {
        let error = model(&config, latent, None).err().expect("an error").to_string();
        assert!(error.ends_with("take multiples of 2 up to 768"), "{error}");
    }
    assert!(model(&config, (768, 128), None).is_ok());
}

/// Of latents that need not be square: the patches' rows and columns differ.
fn small() -> Config {
    Config {
        num_layers: 1,
        attention_head_dim: 4,
        num_attention_heads: 2,
        joint_attention_dim: 3,
        caption_projection_dim: 8,
        pooled_projection_dim: 3,
        sample_size: 8,
        pos_embed_max_size: 6,
        ..Config::sd35_medium()
    }
}

#[test]
fn positions_are_the_middle_of_the_table() -> Result<()> {
    let config = small();
    let stem = Stem::new(&config, (4, 8), None);
    let params = ParamSet::init(&[stem.specs()], 1, &Device::Cpu)?;
    let crop = stem.positions(params.stage(0), DType::F32)?;
    assert_eq!(crop.dims(), [2 * 4, 8]);
    // Two rows from the third on, four columns from the second on, in units of 6 / 4 points; the columns come first.
    let [row, column] = [2.0 / 1.5, 1.0 / 1.5];
    let expected: Vec<f64> =
        [column, row].iter().flat_map(|&at: &f64| [at.sin(), (at * 0.01).sin(), at.cos(), (at * 0.01).cos()]).collect();
    for (ours, expected) in crop.get(0)?.to_vec1::<f32>()?.iter().zip(expected) {
        assert!((f64::from(*ours) - expected).abs() < 1e-6, "{ours} {expected}");
    }
    Ok(())
}

#[test]
fn a_sample_does_not_depend_on_its_neighbours() -> Result<()> {
    let config = Config { num_layers: 2, dual_attention_layers: vec![0], ..small() };
    let model = model(&config, (4, 8), None)?;
    let noise = |id: u64, shape: &[usize]| -> Result<Tensor> {
        let values = Stream::new(3, Purpose::Parameters, [id, 0, 0, 0]).normals(shape.iter().product());
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    };
    let mut id = 10;
    let params = ParamSet::build(&model.specs(), |spec| {
        id += 1;
        Ok((noise(id, &spec.shape)? * 0.3)?)
    })?;
    let inputs = [noise(1, &[2, 16, 4, 8])?, Tensor::new(&[0.2f32, 0.7], &Device::Cpu)?];
    let conditioning = [noise(2, &[2, 5, 3])?, noise(3, &[2, 3])?];
    // The velocities of the samples `rows` in one batch.
    let velocity = |rows: [u32; 2]| -> Result<Vec<Vec<f32>>> {
        let rows = Tensor::new(&rows, &Device::Cpu)?;
        let pick =
            |t: &[Tensor; 2]| -> Result<Vec<Tensor>> { t.iter().map(|t| Ok(t.index_select(&rows, 0)?)).collect() };
        let (x, conditioning) = (pick(&inputs)?, pick(&conditioning)?);
        let v = velocity(&model, &params, &x[0], &x[1], &conditioning)?;
        assert_eq!(v.dims(), [2, 16, 4, 8]);
        Ok(v.flatten_from(1)?.to_vec2()?)
    };
    let (both, swapped, twice) = (velocity([0, 1])?, velocity([1, 0])?, velocity([1, 1])?);
    assert!(both[0] != both[1] && both[0] == swapped[1] && both[1] == swapped[0]);
    assert!(twice[0] == both[1] && twice[1] == both[1]);
    Ok(())
}
