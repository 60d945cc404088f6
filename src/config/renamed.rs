//! Keys that had another name: files and settings that say it still load.

use toml::{Table, Value};

/// The section, the key's name before and its name now.
const RENAMED: [(&str, &str, &str); 3] =
    [("method", "form", "variant"), ("method", "mix", "nft_beta"), ("old_policy", "most", "max")];

/// Gives the keys of a file, or of the values of a setting, their names of today.
///
/// # Errors
/// One line: a key stands there under both of its names.
pub(super) fn keys_of(root: &mut Table) -> Result<(), String> {
    for (section, before, now) in RENAMED {
        let Some(Value::Table(keys)) = root.get_mut(section) else { continue };
        let Some(value) = keys.remove(before) else { continue };
        if keys.contains_key(now) {
            return Err(format!(
                "{section}.{before} = {value}: is the former name of {section}.{now}, which is given too; remove it"
            ));
        }
        keys.insert(now.to_owned(), value);
    }
    Ok(())
}

/// The setting with its key's name of today.
pub(super) fn setting(setting: &str) -> String {
    for (section, before, now) in RENAMED {
        let Some((path, value)) = setting.split_once('=') else { break };
        let mut parts = path.split('.').map(str::trim);
        if (parts.next(), parts.next(), parts.next()) == (Some(section), Some(before), None) {
            return format!("{section}.{now}={value}");
        }
    }
    setting.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_known_by_both_names() {
        assert_eq!(setting("method.mix=0.1"), "method.nft_beta=0.1");
        assert_eq!(setting(" old_policy . most = 0.5"), "old_policy.max= 0.5");
        assert_eq!(setting("method.mixture=1"), "method.mixture=1");
        assert_eq!(setting("method.mix.a=1"), "method.mix.a=1");
        assert_eq!(setting("nothing"), "nothing");
    }
}
