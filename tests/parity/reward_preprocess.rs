//! The CLIP family's image processing against transformers on Pillow (tests/fixtures/clip_preprocess).

use candle_core::{DType, Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::reward::preprocess::{Preprocess, resized_and_cropped};
use image::RgbImage;
use serde_json::Value;
use std::path::PathBuf;

/// Fixtures of the same form elsewhere can be tried with `FLOWRL_FIXTURES`.
fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var_os("FLOWRL_FIXTURES")
        .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
    folder.join(name)
}

/// `[H, W, 3]` of bytes.
fn picture(bytes: &Tensor) -> Result<RgbImage> {
    let (h, w, _) = bytes.dims3()?;
    let raw = bytes.flatten_all()?.to_vec1::<u8>()?;
    Ok(RgbImage::from_raw(w as u32, h as u32, raw).expect("as many bytes as pixels"))
}

#[test]
fn parity_of_resize_crop_and_normalisation_with_transformers() -> Result<()> {
    let meta = std::fs::read_to_string(fixture("clip_preprocess/meta.json")).expect("the fixture");
    let meta: Value = serde_json::from_str(&meta).expect("JSON");
    let io = candle_core::safetensors::load(fixture("clip_preprocess/io.safetensors"), &Device::Cpu)?;
    for (name, case) in meta["cases"].as_object().expect("cases") {
        let picture = picture(&io[&format!("in.{name}")])?;
        let size = case["size"].as_u64().expect("a number") as usize;

        let bytes = Tensor::from_vec(resized_and_cropped(&picture, size), (size, size, 3), &Device::Cpu)?;
        let bytes = bytes.permute((2, 0, 1))?.flatten_all()?.to_vec1::<u8>()?;
        let want = io[&format!("out.{name}.u8")].flatten_all()?.to_vec1::<u8>()?;
        let wrong = bytes.iter().zip(&want).filter(|(a, b)| a != b).count();
        assert_eq!((bytes.len(), wrong), (want.len(), 0), "{name}: bytes that differ");

        let values = Preprocess::Pillow.run(&[picture], size)?.squeeze(0)?;
        let number = |value: &Value| value.as_f64().expect("a number");
        let sum = values.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
        assert!((sum / number(&case["sum"]) - 1.0).abs() < 1e-6, "{name}: {sum}");
        if let Some(want) = io.get(&format!("out.{name}.pixel_values")) {
            let difference = (values - want)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            println!("{name}: {difference:e}");
            assert!(difference < 1e-6, "{name}: {difference}");
        }
    }
    Ok(())
}
