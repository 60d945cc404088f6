//! The ways of a convolution over a picture.

/// How a kernel walks over a picture, and so the size of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walk {
    /// Over every pixel, with zeros around the picture: the same size.
    Same,
    /// Over every second pixel, with zeros below and on the right of the picture only: half the size.
    Half,
    /// Over every pixel of the picture with each pixel doubled in both directions: twice the size.
    Double,
}

impl Walk {
    /// Length of a side of the result.
    pub(super) fn result(self, side: usize) -> usize {
        match self {
            Walk::Same => side,
            Walk::Half => side / 2,
            Walk::Double => 2 * side,
        }
    }

    /// The pixel under place `offset` of a kernel of `size` for the result's pixel `at`; none beyond the picture.
    pub(super) fn source(self, at: usize, offset: usize, size: usize, side: usize) -> Option<usize> {
        match self {
            Walk::Same => (at + offset).checked_sub(size / 2).filter(|&i| i < side),
            Walk::Half => Some(2 * at + offset).filter(|&i| i < side),
            Walk::Double => (at + offset).checked_sub(size / 2).filter(|&i| i < 2 * side).map(|i| i / 2),
        }
    }
}
