//! Pictures as the rewards see them: eight bits a channel, as in a PNG file.

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use image::{Rgb, RgbImage};

/// Rounds images `[B, 3, H, W]` f32 RGB to eight bits a channel, one picture an image: `round(255 x)`, halves to even, as
/// the rewards' own programs do (flow_grpo/rewards.py); values outside [0, 1] are clamped. A picture on disk is therefore scored as the one in memory.
///
/// # Errors
/// [`Error::NotFinite`] for a NaN or infinite value, which names the image; [`Error::Failed`] or [`Error::Tensor`] for another shape.
pub fn to_rgb8(images: &Tensor) -> Result<Vec<RgbImage>> {
    let (count, channels, height, width) = images.dims4()?;
    if channels != 3 || height == 0 || width == 0 {
        return Err(Error::Failed(format!("images have shape {:?}; they must be [B, 3, H, W]", images.dims())));
    }
    let values = images.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let plane = height * width;
    (0..count)
        .map(|i| {
            let image = &values[i * 3 * plane..(i + 1) * 3 * plane]; // [3, H, W]
            if let Some(value) = image.iter().find(|value| !value.is_finite()) {
                return Err(Error::NotFinite(format!("image {i} has a pixel value of {value}; it cannot be scored")));
            }
            Ok(RgbImage::from_fn(width as u32, height as u32, |x, y| {
                let at = y as usize * width + x as usize;
                Rgb([0, 1, 2].map(|c| (image[c * plane + at].clamp(0.0, 1.0) * 255.0).round_ties_even() as u8))
            }))
        })
        .collect()
}
