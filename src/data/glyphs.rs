//! The embedded glyphs task.
