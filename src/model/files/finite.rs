//! Numbers that no weight can be. A file is scanned as it is read, on the bytes that are read anyway: one comparison per
//! element, which keeps up with memory (5 to 6 GB/s on a core whose plain sum reaches 7).

use safetensors::Dtype;

/// What is said of element `at` of the `all` of a tensor.
pub(super) fn not_finite(name: &str, at: usize, all: usize) -> String {
    format!(
        "{name} holds NaN or an infinite number (element {at} of {all}): the file is damaged, or the training that wrote it \
         diverged; download it again, or take an earlier one"
    )
}

/// Elements that are compared without a branch, before one is looked for.
const BLOCK: usize = 1024;

/// The first element of `bytes`, little-endian, that is NaN, infinite or, of f64, too large for f32; none for integers.
pub(super) fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    match dtype {
        Dtype::F8_E4M3 => first(bytes, |[byte]| byte & 0x7f == 0x7f), // it has no infinity
        Dtype::F16 => first(bytes, |element| u16::from_le_bytes(element) & 0x7c00 == 0x7c00),
        Dtype::BF16 => first(bytes, |element| u16::from_le_bytes(element) & 0x7f80 == 0x7f80),
        Dtype::F32 => first(bytes, |element| u32::from_le_bytes(element) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::F64 => first(bytes, |element| !(f64::from_le_bytes(element) as f32).is_finite()),
        _ => None,
    }
}

fn first<const N: usize>(bytes: &[u8], is_bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    let (elements, _) = bytes.as_chunks::<N>();
    for (number, block) in elements.chunks(BLOCK).enumerate() {
        if block.iter().fold(0, |found, element| found | u16::from(is_bad(*element))) != 0 {
            return block.iter().position(|element| is_bad(*element)).map(|at| number * BLOCK + at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    /// The values of each type around the border, by the types' own `is_finite`.
    #[test]
    fn what_is_not_finite_is_found_in_every_type() {
        let values = [0.0, -0.0, 1.0, -6e4, 1e-8, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -f64::NAN];
        for value in values {
            let wanted = (!value.is_finite()).then_some(BLOCK + 7);
            let place = |element: &[u8]| {
                let mut bytes = element.iter().map(|_| 0).collect::<Vec<u8>>().repeat(2 * BLOCK);
                bytes[(BLOCK + 7) * element.len()..][..element.len()].copy_from_slice(element);
                bytes
            };
            let found = [
                first_not_finite(Dtype::F16, &place(&f16::from_f64(value).to_le_bytes())),
                first_not_finite(Dtype::BF16, &place(&bf16::from_f64(value).to_le_bytes())),
                first_not_finite(Dtype::F32, &place(&(value as f32).to_le_bytes())),
                first_not_finite(Dtype::F64, &place(&value.to_le_bytes())),
            ];
            assert_eq!(found, [wanted; 4], "{value}");
        }
        let extremes = [f16::MAX.to_le_bytes(), f16::MIN.to_le_bytes(), f16::MIN_POSITIVE_SUBNORMAL.to_le_bytes()];
        assert_eq!(first_not_finite(Dtype::F16, &extremes.concat()), None);
        assert_eq!(first_not_finite(Dtype::F32, &f32::MAX.to_le_bytes()), None);
        assert_eq!(first_not_finite(Dtype::F64, &[1.0, 1e300].map(f64::to_le_bytes).concat()), Some(1));
        // E4M3 (Micikevicius et al., arXiv 2209.05433, table 1): 448 is 0x7e, NaN 0x7f and 0xff.
        assert_eq!(first_not_finite(Dtype::F8_E4M3, &[0x7e, 0xfe, 0xff]), Some(2));
    }
}
