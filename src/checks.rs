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
    if !value.is_finite() || value <= 0.0 {
        return Err(format!("{key} = {value}: must be a finite number above 0"));
    }
    match is_positive_f32(value) {
        true => Ok(()),
        false => {
            Err(format!("{key} = {value:e}: is none in 32 bits, in which is computed; use one from 1e-37 to 1e38"))
        }
    }
}

/// Whether a number is still above 0 and finite in f32.
pub(crate) fn is_positive_f32(value: f64) -> bool {
    value as f32 > 0.0 && (value as f32).is_finite()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_positive_is_so_in_32_bits() {
        for value in [1e-37, 1.0, 1e38] {
            assert_eq!(positive("sampler.shift", value), Ok(()));
        }
        for value in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(positive("optim.lr", value).unwrap_err().ends_with("must be a finite number above 0"));
        }
        for (value, shown) in [(1e300, "1e300"), (1e-320, "1e-320")] {
            let told = positive("model.lora.alpha", value).unwrap_err();
            assert!(told.starts_with(&format!("model.lora.alpha = {shown}: is none in 32 bits")), "{told}");
        }
    }
}
