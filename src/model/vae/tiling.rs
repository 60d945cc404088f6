//! Decoding a large latent in overlapping tiles, so that memory is that of one tile.

use crate::error::Result;
use candle_core::{DType, Tensor};

/// One part in this many of a tile's side is shared with the next tile.
pub(super) const OVERLAP: usize = 4;

/// `decode` of `latent` `[1, C, h, w]`, tile by tile if a side is longer than `tile` (a multiple of [`OVERLAP`]): a tile
/// begins before the one above it and the one on its left end, and in what they share the pictures go over into each
/// other linearly (diffusers `AutoencoderKL.tiled_decode`, models/autoencoders/autoencoder_kl.py of v0.33.1, which goes
/// over twice where four tiles meet; here the rows are put together first). `decode` gives f32 `[1, 3, scale h, scale w]`.
pub(super) fn tiled(
    latent: &Tensor,
    (tile, scale): (usize, usize),
    mut decode: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (_, _, height, width) = latent.dims4()?;
    if height <= tile && width <= tile {
        return decode(latent);
    }
    let shared = tile / OVERLAP;
    let stride = tile - shared;
    let cut = |t: &Tensor, dim, start: usize, len: usize| t.narrow(dim, start, len.min(t.dim(dim)? - start));
    let (mut rows, mut above) = (Vec::new(), None);
    for y in (0..height).step_by(stride) {
        let mut row = Vec::<Tensor>::new();
        for x in (0..width).step_by(stride) {
            let picture = decode(&cut(&cut(latent, 2, y, tile)?, 3, x, tile)?)?;
            row.push(match row.last() {
                Some(left) => blend(left, &picture, 3, shared * scale)?,
                None => picture,
            });
        }
        let kept = row.iter().map(|p| cut(p, 3, 0, stride * scale)).collect::<candle_core::Result<Vec<_>>>()?;
        let mut row = Tensor::cat(&kept, 3)?;
        if let Some(above) = &above {
            row = blend(above, &row, 2, shared * scale)?;
        }
        rows.push(cut(&row, 2, 0, stride * scale)?);
        above = Some(row);
    }
    Ok(Tensor::cat(&rows, 2)?)
}

/// `picture` with its first `shared` lines along `dim` going over from the last lines of `before`.
fn blend(before: &Tensor, picture: &Tensor, dim: usize, shared: usize) -> Result<Tensor> {
    let (end, len) = (before.dim(dim)?, picture.dim(dim)?);
    let shared = shared.min(end).min(len);
    let mut shape = [1; 4];
    shape[dim] = shared;
    let weight = Tensor::arange(0u32, shared as u32, picture.device())?.to_dtype(DType::F32)?;
    let weight = (weight / shared as f64)?.reshape(&shape)?;
    let old = before.narrow(dim, end - shared, shared)?.broadcast_mul(&weight.affine(-1.0, 1.0)?)?;
    let new = picture.narrow(dim, 0, shared)?.broadcast_mul(&weight)?;
    Ok(Tensor::cat(&[&(old + new)?, &picture.narrow(dim, shared, len - shared)?], dim)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};
    use candle_core::Device;

    fn doubled(latent: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = latent.dims4()?;
        Ok(latent.upsample_nearest2d(2 * h, 2 * w)?)
    }

    #[test]
    fn a_local_decoder_gives_the_same_picture_tiled() -> Result<()> {
        for (height, width) in [(8, 8), (9, 8), (8, 21), (13, 30), (25, 7)] {
            let values = Stream::new(5, Purpose::Parameters, [0; 4]).normals(3 * height * width);
            let latent = Tensor::from_vec(values, (1, 3, height, width), &Device::Cpu)?;
            let mut largest = 0;
            let ours = tiled(&latent, (8, 2), |tile| {
                largest = largest.max(tile.dim(2)?).max(tile.dim(3)?);
                doubled(tile)
            })?;
            let error = (ours - doubled(&latent)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(error <= 2e-7, "{height} x {width}: {error}");
            assert_eq!(largest, 8.min(height.max(width)));
        }
        Ok(())
    }

    /// Tiles of one colour each: between them the colour goes over in a straight line.
    #[test]
    fn tiles_go_over_into_each_other_linearly() -> Result<()> {
        let latent = Tensor::zeros((1, 1, 14, 20), DType::F32, &Device::Cpu)?;
        let mut count = 0f64;
        let picture = tiled(&latent, (8, 2), |tile| {
            count += 1.0;
            Ok(doubled(tile)?.affine(0.0, count)?)
        })?;
        // Rows begin at 0, 6 and 12, columns at 0, 6, 12 and 18; of each two latent pixels, four of the picture, are shared.
        assert_eq!((count, picture.dims()), (12.0, [1, 1, 28, 40].as_slice()));
        let picture = picture.squeeze(0)?.squeeze(0)?.to_vec2::<f32>()?;
        // The number of the tile as a function of the place: whole at the end of what is shared, less at its start.
        let tile = |at: usize| (at / 12) as f64 - 1.0 + if at < 12 { 1.0 } else { (at % 12).min(4) as f64 / 4.0 };
        for (y, row) in picture.iter().enumerate() {
            for (x, &value) in row.iter().enumerate() {
                let wanted = 1.0 + 4.0 * tile(y) + tile(x);
                assert!((f64::from(value) - wanted).abs() < 1e-5, "({y}, {x}): {value} {wanted}");
            }
        }
        Ok(())
    }
}
