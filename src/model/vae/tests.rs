//! The autoencoder beyond the recorded values.

use super::*;
use crate::rng::{Purpose, Stream};

/// The embedded shapes of the recorded model, with random weights.
fn small(tile: usize) -> Result<Vae> {
    let config =
        Config { block_out_channels: vec![8, 16, 16], norm_num_groups: 4, latent_channels: 4, ..Config::sd3() };
    Vae::random(config, 3, DType::F32, &Device::Cpu)?.with_tile(tile)
}

fn noise(id: u64, shape: [usize; 4]) -> Result<Tensor> {
    let values = Stream::new(7, Purpose::Parameters, [id, 0, 0, 0]).normals(shape.iter().product());
    Ok(Tensor::from_vec(values, &shape, &Device::Cpu)?)
}

fn values(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.flatten_all()?.to_vec1()?)
}

fn max_error(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar()?)
}

#[test]
fn a_picture_does_not_depend_on_its_neighbours() -> Result<()> {
    let (vae, x0) = (small(4)?, noise(0, [3, 4, 6, 5])?);
    let (together, latents) = (vae.decode(&x0)?, vae.encode(&vae.decode(&x0)?)?);
    for i in 0..3 {
        let alone = vae.decode(&x0.narrow(0, i, 1)?)?;
        assert_eq!(values(&alone)?, values(&together.narrow(0, i, 1)?)?);
        assert_eq!(values(&vae.encode(&alone)?)?, values(&latents.narrow(0, i, 1)?)?);
    }
    Ok(())
}

#[test]
fn threads_change_no_bit() -> Result<()> {
    let (vae, x0) = (small(TILE)?, noise(1, [1, 4, 13, 21])?);
    let whole = values(&vae.decode(&x0)?)?;
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        assert_eq!(pool.install(|| vae.decode(&x0).and_then(|p| values(&p)))?, whole, "{threads} threads");
    }
    Ok(())
}

#[test]
fn odd_sides_are_kept() -> Result<()> {
    let vae = small(TILE)?;
    for (height, width) in [(1, 1), (1, 7), (5, 3)] {
        let picture = vae.decode(&noise(2, [1, 4, height, width])?)?;
        assert_eq!(picture.dims(), [1, 3, 4 * height, 4 * width]);
        assert!(values(&picture)?.iter().all(|x| (0.0..=1.0).contains(x)));
        assert_eq!(vae.encode(&picture)?.dims(), [1, 4, height, width]);
    }
    Ok(())
}

/// What no other tile shares is the tile decoded alone, to the bit.
#[test]
fn a_large_latent_is_decoded_in_tiles() -> Result<()> {
    let (tile, height, width) = (8, 13, 14);
    let latent = noise(3, [1, 4, height, width])?;
    let whole = small(TILE)?;
    let tiled = small(tile)?.decode(&latent)?;
    assert_eq!(tiled.dims(), [1, 3, 4 * height, 4 * width]);
    // Tiles begin at 0, 6 and 12; the first is shared from 6 on, the second up to 8 and from 12 on.
    for (from, own) in [(0, 0..6), (6, 8..12)] {
        let alone = whole.decode(&latent.narrow(2, from, tile.min(height - from))?.narrow(3, from, tile)?)?;
        let (start, len) = (4 * own.start, 4 * own.len());
        let ours = tiled.narrow(2, start, len)?.narrow(3, start, len)?;
        let wanted = alone.narrow(2, start - 4 * from, len)?.narrow(3, start - 4 * from, len)?;
        assert_eq!(values(&ours)?, values(&wanted)?, "from {from}");
    }
    assert_ne!(values(&tiled)?, values(&whole.decode(&latent)?)?);
    let fits = latent.narrow(2, 0, 8)?.narrow(3, 0, 8)?;
    assert_eq!(values(&small(tile)?.decode(&fits)?)?, values(&whole.decode(&fits)?)?);
    Ok(())
}

#[test]
fn the_full_model_has_as_many_parameters_as_published() {
    let config = Config::sd3();
    let count = |stages: Vec<Box<dyn Stage>>| -> usize {
        let specs = stages.iter().flat_map(|s| s.specs());
        specs.map(|spec| spec.shape.iter().product::<usize>()).sum()
    };
    assert_eq!(count(coder::encoder(&config)) + count(coder::decoder(&config)), 83_819_683);
}

const MICRO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/vae_micro");

#[test]
fn older_configurations_have_defaults() -> Result<()> {
    let text = r#"{"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "latent_channels": 16, "norm_num_groups": 32, "scaling_factor": 1.5305, "shift_factor": 0.0609,
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]}"#;
    let parsed = Config::parse(text).expect("a configuration");
    assert_eq!(parsed, Config { use_quant_conv: true, use_post_quant_conv: true, ..Config::sd3() });
    let without_shift = text.replace("0.0609", "null");
    assert_eq!(Config::parse(&without_shift).expect("a configuration").shift_factor, 0.0);
    Ok(())
}

#[test]
fn settings_that_are_not_supported_are_named() {
    let text = std::fs::read_to_string(Path::new(MICRO).join("config.json")).expect("the fixture");
    for (old, new, message) in [
        ("\"AutoencoderKL\"", "\"AutoencoderTiny\"", "has _class_name = \"AutoencoderTiny\", not \"AutoencoderKL\""),
        ("\"DownEncoderBlock2D\"", "\"AttnDownEncoderBlock2D\"", "has down_block_types = "),
        ("\"silu\"", "\"gelu\"", "has act_fn = \"gelu\", not \"silu\""),
        ("\"in_channels\": 3", "\"in_channels\": 4", "has in_channels = 4, not 3"),
        (
            "\"mid_block_add_attention\": true",
            "\"mid_block_add_attention\": false",
            "has mid_block_add_attention = false",
        ),
        ("\"latents_mean\": null", "\"latents_mean\": [0.5]", "has latents_mean = [0.5], not null"),
        ("\"norm_num_groups\": 4", "\"norm_num_groups\": 3", "has sizes that make no model"),
        ("1.5305", "0.0", "has sizes that make no model"),
        ("\"latent_channels\": 16", "\"latent_channels\": \"many\"", "cannot be used: invalid type"),
        ("{", "", "is not JSON"),
    ] {
        assert!(text.contains(old), "{old}");
        let error = Config::parse(&text.replacen(old, new, 1)).expect_err(new);
        assert!(error.starts_with(message), "{new}: {error}");
    }
}

/// A copy of the recorded model whose tensors `change` has changed.
fn changed(change: impl FnOnce(&mut std::collections::HashMap<String, Tensor>)) -> Result<Result<Vae>> {
    let micro = Path::new(MICRO);
    let mut tensors = candle_core::safetensors::load(micro.join("diffusion_pytorch_model.safetensors"), &Device::Cpu)?;
    change(&mut tensors);
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::copy(micro.join("config.json"), folder.path().join("config.json")).expect("a copy");
    candle_core::safetensors::save(&tensors, folder.path().join("diffusion_pytorch_model.safetensors"))?;
    Ok(Vae::load(folder.path(), DType::F32, &Device::Cpu))
}

#[test]
fn weights_that_do_not_fit_are_named() -> Result<()> {
    let error = changed(|tensors| {
        tensors.remove("decoder.conv_in.bias");
        let other = tensors["encoder.conv_in.bias"].reshape((2, 4)).expect("another shape");
        tensors.insert("encoder.conv_in.bias".into(), other.clone());
        tensors.insert("quant_conv.bias".into(), other);
    })?;
    let error = error.err().expect("an error");
    assert!(matches!(error, Error::File { .. }));
    let error = error.to_string();
    for part in
        ["decoder.conv_in.bias [16] is missing", "encoder.conv_in.bias is [2, 4], not [8]", "quant_conv.bias is not"]
    {
        assert!(error.contains(part), "{error}");
    }
    Ok(())
}

#[test]
fn older_names_of_the_attention_are_read() -> Result<()> {
    let vae = changed(|tensors| {
        for name in tensors.keys().cloned().collect::<Vec<_>>() {
            let old = OLD_NAMES.iter().fold(name.clone(), |name, (new, old)| {
                name.replace(&format!("attentions.0.{new}."), &format!("attentions.0.{old}."))
            });
            let tensor = tensors.remove(&name).expect("a tensor");
            tensors.insert(old, tensor);
        }
        assert!(tensors.contains_key("decoder.mid_block.attentions.0.proj_attn.weight"));
    })??;
    let x0 = noise(4, [1, 16, 3, 2])?;
    let today = Vae::load(Path::new(MICRO), DType::F32, &Device::Cpu)?;
    assert_eq!(values(&vae.decode(&x0)?)?, values(&today.decode(&x0)?)?);
    Ok(())
}

/// The convolutions of one pixel that models before Stable Diffusion 3 have: with the identity in them nothing changes.
#[test]
fn quant_convolutions_stand_at_the_latent() -> Result<()> {
    let plain = small(TILE)?;
    let config = Config { use_quant_conv: true, use_post_quant_conv: true, ..plain.config.clone() };
    let stages = [coder::encoder(&config), coder::decoder(&config)];
    let identity = |scale: f64| {
        move |spec: &Spec| match spec.shape.as_slice() {
            &[n, _, 1, 1] if spec.name.contains("quant_conv") => {
                Ok((Tensor::eye(n, DType::F32, &Device::Cpu)? * scale)?.reshape((n, n, 1, 1))?)
            }
            _ => spec.initial(3, &Device::Cpu),
        }
    };
    let vae = Vae::build(config, stages, DType::F32, identity(2.0))?;
    let x0 = noise(5, [1, 4, 4, 4])?;
    // Twice the raw latent x0 / scaling + shift is that of 2 x0 + shift * scaling.
    let moved = x0.affine(2.0, vae.config.shift_factor * vae.config.scaling_factor)?;
    assert!(max_error(&vae.decode(&x0)?, &plain.decode(&moved)?)? <= 1e-5);
    let pictures = plain.decode(&x0)?;
    let (mean, logvar) = vae.moments(&pictures)?;
    let (plain_mean, plain_logvar) = plain.moments(&pictures)?;
    assert!(max_error(&mean, &(plain_mean * 2.0)?)? <= 1e-5);
    assert!(max_error(&logvar, &(plain_logvar * 2.0)?)? <= 1e-5);
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_refused() -> Result<()> {
    let vae = small(TILE)?;
    let error = vae.decode(&noise(6, [1, 3, 4, 4])?).expect_err("three channels").to_string();
    assert!(error.contains("samples have shape [1, 3, 4, 4]; they must be [B, 4, H, W]"), "{error}");
    let error = vae.encode(&noise(6, [1, 3, 4, 6])?).expect_err("six columns").to_string();
    assert!(error.contains("sides of multiples of 4"), "{error}");
    assert!(vae.decode(&Tensor::zeros((0, 4, 2, 2), DType::F32, &Device::Cpu)?).is_err());
    assert!(matches!(vae.with_tile(6).err(), Some(Error::Usage(message)) if message.contains("take a multiple of 4")));
    Ok(())
}
