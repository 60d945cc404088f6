//! The name of this host.

/// As the system gives it; containers on different hosts may have the same.
pub(crate) fn hostname() -> String {
    gethostname::gethostname().to_string_lossy().into_owned()
}
