//! The published models of this architecture.

use super::{Config, QkNorm};

/// A published model. Others of its layout count as small ones of it.
#[derive(Debug)]
pub struct Release {
    /// What configurations call it.
    pub kind: &'static str,
    /// What its authors call it.
    pub title: &'static str,
    /// Its sizes.
    pub sizes: fn() -> Config,
}

/// Stable Diffusion 3.5 Medium: 2,243,171,520 parameters.
pub static MEDIUM: Release =
    Release { kind: "sd35-medium", title: "Stable Diffusion 3.5 Medium", sizes: Config::sd35_medium };

/// Stable Diffusion 3.5 Large.
pub static LARGE: Release =
    Release { kind: "sd35-large", title: "Stable Diffusion 3.5 Large", sizes: Config::sd35_large };

/// Stable Diffusion 3 Medium.
pub static SD3_MEDIUM: Release =
    Release { kind: "sd3-medium", title: "Stable Diffusion 3 Medium", sizes: Config::sd3_medium };

/// All of them.
pub static RELEASES: [&Release; 3] = [&MEDIUM, &LARGE, &SD3_MEDIUM];

impl Config {
    /// The published model of this layout, if it is that of any.
    pub fn release(&self) -> Option<&'static Release> {
        RELEASES.into_iter().find(|release| (release.sizes)().layout() == self.layout())
    }

    /// What makes a model another one than its sizes: whether blocks have a second attention, and the norm of q and k.
    fn layout(&self) -> (bool, Option<QkNorm>) {
        (!self.dual_attention_layers.is_empty(), self.qk_norm)
    }
}
