//! Two linear layers with GELU between them. On a GPU what is between them is kept once, and the gradient goes back through
//! GELU inside a product.

use super::{Wanted, linear_for, linear_gelu};
use candle_core::{Result, Tensor};

/// `gelu(x W1^T + b1) W2^T + b2` with x `[.., in]`, W1 `[hidden, in]`, W2 `[out, hidden]`; result `[.., out]`.
pub fn feed_forward(
    x: &Tensor,
    first: (&Tensor, Option<&Tensor>),
    second: (&Tensor, Option<&Tensor>),
    wanted: Wanted,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let (Some(b1), Some(b2)) = (first.1, second.1)
        && let Some(y) = super::cuda::feed_forward([x, first.0, b1, second.0, b2], wanted)?
    {
        return Ok(y);
    }
    linear_for(wanted, &linear_gelu(x, first.0, first.1)?, second.0, second.1)
}
