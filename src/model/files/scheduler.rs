//! What a pipeline's scheduler says of the times that pictures are sampled at.

use crate::checks::is_positive_f32;
use crate::error::{Error, Result};
use crate::fs;
use serde_json::{Map, Value};
use std::path::Path;

/// The scheduler whose grid [`crate::flow::sigmas`] is.
const CLASS: &str = "FlowMatchEulerDiscreteScheduler";
/// Training times that the grid is made for.
const TRAIN_TIMESTEPS: u64 = 1000;
/// Keys that say something of another grid only where `use_dynamic_shifting` is true, and the file's version.
const WITHOUT_EFFECT: [&str; 6] =
    ["_diffusers_version", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"];
/// File of a scheduler in its folder.
pub const SCHEDULER: &str = "scheduler_config.json";

/// What to do about a scheduler that means another grid, where nothing is done about it yet.
pub const SHIFT_REMEDY: &str = "; set sampler.shift to sample on that grid all the same";

/// The timestep shift that a scheduler's configuration means; nothing where it says none.
///
/// # Errors
/// [`Error::File`]: the file cannot be read, or means another grid than a constant shift gives.
pub fn read_shift(file: &Path) -> Result<Option<f64>> {
    let text = fs::read_to_string(file)?;
    let json =
        serde_json::from_str(&text).map_err(|e| format!("is not a scheduler's configuration ({e}); download it again"));
    json.and_then(|json| shift(&json)).map_err(|message| Error::File { path: file.to_path_buf(), message })
}

/// The shift of a scheduler of diffusers; every other key must leave the grid as it is.
fn shift(scheduler: &Map<String, Value>) -> std::result::Result<Option<f64>, String> {
    let mut shift = None;
    for (key, value) in scheduler {
        let is_off = match value {
            Value::Null | Value::Bool(false) => true,
            Value::String(text) => text.is_empty(),
            Value::Array(list) => list.is_empty(),
            Value::Object(object) => object.is_empty(),
            Value::Bool(true) | Value::Number(_) => false,
        };
        let known = match key.as_str() {
            "_class_name" => *value == CLASS,
            "num_train_timesteps" => *value == TRAIN_TIMESTEPS,
            "shift" => {
                shift = value.as_f64().filter(|&shift| is_positive_f32(shift));
                shift.is_some()
            }
            key => is_off || WITHOUT_EFFECT.contains(&key),
        };
        if !known {
            return Err(format!(
                "{key} = {value}: this program samples on the grid of a {CLASS} with a constant shift and {TRAIN_TIMESTEPS} \
                 training timesteps{SHIFT_REMEDY}"
            ));
        }
    }
    Ok(shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(json: Value) -> std::result::Result<Option<f64>, String> {
        shift(json.as_object().unwrap())
    }

    /// scheduler/scheduler_config.json of stabilityai/stable-diffusion-3.5-medium, and as diffusers 0.33 saves it again.
    #[test]
    fn the_shift_is_that_of_the_published_file() {
        let published = json!({"_class_name": CLASS, "_diffusers_version": "0.29.0.dev0", "num_train_timesteps": 1000, "shift": 3.0});
        assert_eq!(of(published), Ok(Some(3.0)));
        let saved = json!({
            "_class_name": CLASS, "_diffusers_version": "0.33.1", "base_image_seq_len": 256, "base_shift": 0.5,
            "invert_sigmas": false, "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 1.5,
            "shift_terminal": null, "stochastic_sampling": false, "time_shift_type": "exponential",
            "use_beta_sigmas": false, "use_dynamic_shifting": false, "use_exponential_sigmas": false,
            "use_karras_sigmas": false
        });
        assert_eq!(of(saved), Ok(Some(1.5)));
        assert_eq!(of(json!({"_class_name": CLASS})), Ok(None));
    }

    #[test]
    fn what_means_another_grid_is_refused_by_name() {
        for (key, value) in [
            ("_class_name", json!("DPMSolverMultistepScheduler")),
            ("num_train_timesteps", json!(500)),
            ("use_dynamic_shifting", json!(true)),
            ("shift_terminal", json!(0.1)),
            ("use_karras_sigmas", json!(true)),
            ("use_exponential_sigmas", json!(true)),
            ("use_beta_sigmas", json!(true)),
            ("invert_sigmas", json!(true)),
            ("stochastic_sampling", json!(true)),
            ("shift", json!(0)),
            ("shift", json!("3")),
            ("shift", json!(1e300)),
            ("a_key_of_tomorrow", json!("cosine")),
        ] {
            let message = of(json!({"shift": 3.0, key: value.clone()})).unwrap_err();
            assert!(message.starts_with(&format!("{key} = {value}: ")), "{message}");
            assert!(message.contains("set sampler.shift"), "{message}");
        }
        assert_eq!(of(json!({"shift": 2, "a_key_of_tomorrow": []})), Ok(Some(2.0)));
    }
}
