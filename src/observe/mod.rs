//! What people look at: metrics, progress, image grids, logs and the report page.
//!
//! Nothing here changes a number of the run. All human output goes to stderr, and only from rank 0.

pub mod grid;
pub mod logging;
pub mod metrics;
pub mod progress;
pub mod report;
pub mod tensorboard;

pub use logging::Terminal;
pub use metrics::{Metrics, MetricsLog};
pub use progress::Progress;
pub(crate) use progress::in_words;
