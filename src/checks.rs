//! What a number of a configuration may be. Each problem is one line: key, value, remedy.

use serde::Serialize;
use toml::Value;

/// Nothing, or one line: key, value, remedy.
pub(crate) type Check = Result<(), String>;

/// The largest count that makes sense of anything; sums and products of counts stay far from overflow.
pub(crate) const LARGEST_COUNT: u64 = 1_000_000;

pub(crate) fn count(key: &str, value: usize) -> Check {
    within(key, value as u64, 1, LARGEST_COUNT)
}

pub(crate) fn within(key: &str, value: u64, least: u64, most: u64) -> Check {
    match value {
        v if v < least => Err(format!("{key} = {value}: must be at least {least}")),
        v if v > most => Err(format!("{key} = {value}: must be at most {most}")),
        _ => Ok(()),
    }
}

pub(crate) fn positive(key: &str, value: f64) -> Check {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(format!("{key} = {value}: must be a finite number above 0")),
    }
}

/// For a bound, which may be left away.
pub(crate) fn positive_or_inf(key: &str, value: f64) -> Check {
    match value > 0.0 {
        true => Ok(()),
        false => Err(format!("{key} = {value}: must be a finite number above 0, or inf for no bound")),
    }
}

pub(crate) fn not_negative(key: &str, value: f64) -> Check {
    match value.is_finite() && value >= 0.0 {
        true => Ok(()),
        false => Err(format!("{key} = {value}: must be a finite number, 0 or above")),
    }
}

pub(crate) fn fraction(key: &str, value: f64) -> Check {
    match (0.0..1.0).contains(&value) {
        true => Ok(()),
        false => Err(format!("{key} = {value}: must lie in [0, 1)")),
    }
}

/// A value as it stands in the file.
pub(crate) fn text<T: Serialize>(value: T) -> Result<String, String> {
    Ok(Value::try_from(value).map_err(|e| e.to_string())?.to_string())
}

/// An address without what may be a secret in it: a user and a password, or what follows `?` or `#`.
pub(crate) fn without_secrets(address: &str) -> String {
    let (before, host) = address.rsplit_once('@').map_or(("", address), |(_, host)| ("...@", host));
    match host.split_once(['?', '#']) {
        None => format!("{before}{host}"),
        Some((host, _)) => format!("{before}{host}?..."),
    }
}
