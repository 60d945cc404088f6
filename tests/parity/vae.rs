//! The autoencoder of Stable Diffusion 3 against recorded values of diffusers (tests/fixtures/vae_micro: its meta.json
//! says how they were made). FLOWRL_FIXTURES names another folder of the same form.
//!
//! `cargo test --release --test parity vae:: -- --nocapture` prints the errors.

use candle_core::{DType, Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::model::vae::{Coder, Vae};
use flowrl_dist::reward::to_rgb8;
use std::collections::HashMap;
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var_os("FLOWRL_FIXTURES")
        .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
    folder.join("vae_micro").join(name)
}

fn recorded() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture("io.safetensors"), &Device::Cpu).expect("the fixture")
}

fn vae(dtype: DType) -> Result<Vae> {
    Vae::load(&fixture(""), dtype, &Device::Cpu)
}

/// Compares with the recorded tensor: the largest difference, and `tolerance` of the largest value as its limit.
fn check(name: &str, ours: &Tensor, recorded: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(ours.dims(), recorded.dims(), "{name}");
    let scale = f64::from(recorded.abs()?.max_all()?.to_scalar::<f32>()?);
    let error = f64::from((ours - recorded)?.abs()?.max_all()?.to_scalar::<f32>()?);
    eprintln!("{name}: {error:.1e} of {scale:.2}");
    assert!(error <= tolerance * scale, "{name}: {error:.1e} of {scale:.2}");
    Ok(())
}

/// Runs the stages one after the other; each stage's output that was recorded under `names` must be the same.
fn check_stages(coder: &Coder, x: Tensor, names: &[&str]) -> Result<()> {
    let recorded = recorded();
    let mut io = vec![x.permute((0, 2, 3, 1))?.contiguous()?];
    for ((index, stage), name) in coder.stages.iter().enumerate().zip(names) {
        io = stage.forward(coder.params.stage(index), &io)?;
        if let Some(recorded) = recorded.get(*name) {
            check(name, &io[0].permute((0, 3, 1, 2))?, recorded, 1e-5)?;
        }
    }
    assert_eq!(coder.stages.len(), names.len());
    assert!(names.iter().filter(|name| recorded.contains_key(**name)).count() >= 5, "most stages are recorded");
    Ok(())
}

#[test]
fn parity_of_every_decoder_stage_with_diffusers() -> Result<()> {
    let vae = vae(DType::F32)?;
    let latent = ((&recorded()["in.latent"] / vae.config.scaling_factor)? + vae.config.shift_factor)?;
    let names = ["dec.conv_in", "dec.mid", "dec.up0", "dec.up1", "dec.up2", "dec.up3", "decoded"];
    let names = names.map(|name| format!("out.{name}"));
    check_stages(&vae.decoder, latent, &names.each_ref().map(String::as_str))
}

#[test]
fn parity_of_every_encoder_stage_with_diffusers() -> Result<()> {
    let names = ["enc.conv_in", "enc.down0", "enc.down1", "enc.down2", "enc.down3", "enc.mid", "enc.end"];
    let names = names.map(|name| format!("out.{name}"));
    check_stages(&vae(DType::F32)?.encoder, recorded()["in.image"].clone(), &names.each_ref().map(String::as_str))
}

#[test]
fn parity_of_pictures_with_diffusers() -> Result<()> {
    let recorded = recorded();
    let wanted = recorded["out.decoded"].affine(0.5, 0.5)?.clamp(0f32, 1f32)?;
    let ours = vae(DType::F32)?.decode(&recorded["in.latent"])?;
    check("pictures", &ours, &wanted, 1e-5)?;
    // Eight bits a channel: the same, but for values that lie on the border between two.
    let eight_bits = recorded["out.decoded_u8"].permute((0, 2, 3, 1))?.flatten_from(1)?.to_vec2::<u8>()?;
    let exact = (wanted.permute((0, 2, 3, 1))?.flatten_from(1)? * 255.0)?.to_vec2::<f32>()?;
    let mut borderline = 0;
    for ((ours, recorded), exact) in to_rgb8(&ours)?.iter().zip(&eight_bits).zip(&exact) {
        assert_eq!(ours.as_raw().len(), recorded.len());
        for ((ours, recorded), exact) in ours.as_raw().iter().zip(recorded).zip(exact) {
            let border = (exact.fract() - 0.5).abs() <= 255.0 * 1e-5;
            assert!(ours == recorded || border && ours.abs_diff(*recorded) == 1, "{ours} {recorded} {exact}");
            borderline += usize::from(ours != recorded);
        }
    }
    assert!(borderline <= 3, "{borderline} values differ");
    // Weights and activations of eight bits' precision: about as much in the picture.
    check("pictures in bf16", &vae(DType::BF16)?.decode(&recorded["in.latent"])?, &wanted, 4e-2)
}

#[test]
fn parity_of_latents_with_diffusers() -> Result<()> {
    let recorded = recorded();
    let vae = vae(DType::F32)?;
    let pictures = recorded["in.image"].affine(0.5, 0.5)?;
    let (mean, logvar) = vae.moments(&pictures)?;
    check("mean", &mean, &recorded["out.mean"], 1e-5)?;
    check("logvar", &logvar, &recorded["out.logvar"], 1e-5)?;
    check("latent", &vae.encode(&pictures)?, &recorded["out.latent_mode_scaled"], 1e-5)
}
