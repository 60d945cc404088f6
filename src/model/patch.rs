//! Patches of a picture or latent as tokens.

use crate::error::Result;
use candle_core::Tensor;

/// `[B, C, H, W]` to `[B, (H/p)(W/p), C p p]`.
pub(super) fn patchify(x: &Tensor, patch: usize) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let (rows, columns) = (height / patch, width / patch);
    let x = x.reshape(&[batch, channels, rows, patch, columns, patch][..])?;
    Ok(x.permute(vec![0, 2, 4, 1, 3, 5])?.contiguous()?.reshape((batch, rows * columns, channels * patch * patch))?)
}

/// The inverse of [`patchify`].
pub(super) fn unpatchify(x: &Tensor, patch: usize, (height, width): (usize, usize)) -> Result<Tensor> {
    let (batch, _, dim) = x.dims3()?;
    let (rows, columns, channels) = (height / patch, width / patch, dim / (patch * patch));
    let x = x.reshape(&[batch, rows, columns, channels, patch, patch][..])?;
    Ok(x.permute(vec![0, 3, 1, 4, 2, 5])?.contiguous()?.reshape((batch, channels, height, width))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn patches_go_there_and_back() -> Result<()> {
        let x = Tensor::arange(0f32, 2.0 * 3.0 * 12.0 * 18.0, &Device::Cpu)?.reshape((2, 3, 12, 18))?;
        let patches = patchify(&x, 6)?;
        assert_eq!(patches.dims(), [2, 6, 108]);
        // The second patch starts six columns to the right.
        assert_eq!(patches.get(0)?.get(1)?.get(0)?.to_scalar::<f32>()?, 6.0);
        let back = unpatchify(&patches, 6, (12, 18))?;
        assert_eq!(back.flatten_all()?.to_vec1::<f32>()?, x.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    }
}
