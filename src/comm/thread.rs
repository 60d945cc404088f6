//! Ranks as threads of one process: for tests.

/// R communicators joined in memory.
pub struct ThreadGroup;
