//! How large a model may be that a configuration describes. Sizes are compared with these numbers before anything is made
//! of them, and then with the shapes in the weights' file before memory for the weights is asked for.

use crate::checks::is_positive_f32;

/// Blocks of a stack; the deepest models of this kind have about 60.
pub(super) const LAYERS: usize = 1024;
/// Features, channels, tokens of a text, pixels of a side: anything that a matrix or a grid is as long as.
pub(super) const WIDTH: usize = 1 << 16;
/// Rows of a table of tokens.
pub(super) const VOCABULARY: usize = 1 << 22;
/// Patches along a side of the table of positions, which has the square of it as rows.
pub(super) const POSITIONS: usize = 1 << 12;
/// Levels of an autoencoder, each of half the size of the one before.
pub(super) const LEVELS: usize = 8;

/// Whether every size, with its key and its largest value, is at least 1 and at most that.
///
/// # Errors
/// The first that is not: `has KEY = VALUE; ...`, to stand behind the file's name.
pub(super) fn within(sizes: &[(&str, usize, usize)]) -> Result<(), String> {
    for &(key, value, most) in sizes {
        if !(1..=most).contains(&value) {
            return Err(format!("has {key} = {value}; a model has 1 to {most}: is this the right file?"));
        }
    }
    Ok(())
}

/// Whether what is added under a root, with its key, is above 0 and finite, in f32 as well.
///
/// # Errors
/// As [`within`].
pub(super) fn positive(key: &str, value: f64) -> Result<(), String> {
    match is_positive_f32(value) {
        true => Ok(()),
        false => Err(format!("has {key} = {value}; a model has a small number above 0: is this the right file?")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_that_is_out_of_bounds_is_named() {
        assert_eq!(within(&[("num_layers", 24, LAYERS), ("d_model", WIDTH, WIDTH)]), Ok(()));
        for wrong in [0, LAYERS + 1, usize::MAX] {
            let message = within(&[("d_model", 64, WIDTH), ("num_layers", wrong, LAYERS)]).unwrap_err();
            assert!(message.starts_with(&format!("has num_layers = {wrong};")), "{message}");
        }
    }

    #[test]
    fn what_stands_under_a_root_is_above_zero() {
        assert_eq!(positive("layer_norm_eps", 1e-6), Ok(()));
        for wrong in [0.0, -1e9, 1e-320, 1e300, f64::NAN, f64::INFINITY] {
            let message = positive("layer_norm_eps", wrong).unwrap_err();
            assert!(message.starts_with(&format!("has layer_norm_eps = {wrong};")), "{message}");
        }
    }
}
