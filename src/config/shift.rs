//! `sampler.shift` where the configuration does not say it: the model's own.

use super::RunConfig;
use crate::error::Error;
use crate::flow::DEFAULT_SHIFT;
use crate::model::files::SHIFT_REMEDY;

impl RunConfig {
    /// Says the shift, where that is left open, as the model's scheduler does, so that OUT/config.toml has it.
    ///
    /// # Errors
    /// [`Error::File`]: the scheduler means a grid that this program does not have.
    pub(super) fn resolve_shift(&mut self) -> Result<(), Error> {
        if self.sampler.shift.is_none() {
            self.sampler.shift = Some(self.model.shift()?.unwrap_or(DEFAULT_SHIFT));
        }
        Ok(())
    }

    /// What is to be told where the configuration says another shift than the model's scheduler.
    pub fn shift_note(&self) -> Option<String> {
        let shift = self.sampler.shift();
        match self.model.shift() {
            Ok(None) => None,
            Ok(Some(own)) if own == shift => None,
            Ok(Some(own)) => {
                let path = self.model.scheduler().unwrap_or_default();
                Some(format!("sampler.shift = {shift}: the model's own is {own} ({})", path.display()))
            }
            Err(e) => {
                let why = e.to_string();
                let why = why.strip_suffix(SHIFT_REMEDY).unwrap_or(&why);
                Some(format!("sampler.shift = {shift} is used, but {why}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shift_is_the_models_where_the_configuration_says_none() {
        let folder = tempfile::tempdir().unwrap();
        let load = |set: &[&str]| {
            let model = [format!("model.path={}", folder.path().display()), "model.kind=sd35-medium".into()];
            let reward = "reward=[{name=\"jpeg-compressibility\"}]".to_owned();
            let set: Vec<String> = model.into_iter().chain([reward]).chain(set.iter().map(|s| s.to_string())).collect();
            RunConfig::load(None, &set)
        };
        let shift = |set: &[&str]| load(set).map(|config| (config.sampler.shift, config.shift_note()));
        assert_eq!(shift(&[]).unwrap(), (Some(3.0), None), "no file");
        let file = folder.path().join("scheduler/scheduler_config.json");
        std::fs::create_dir(file.parent().unwrap()).unwrap();
        std::fs::write(&file, r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.5}"#).unwrap();
        assert_eq!(shift(&[]).unwrap(), (Some(1.5), None));
        let (set, note) = shift(&["sampler.shift=3"]).unwrap();
        let expected = format!("sampler.shift = 3: the model's own is 1.5 ({})", file.display());
        assert_eq!((set, note), (Some(3.0), Some(expected)));
        // What is written and what runs are compared by.
        let [own, said, other] = [&[][..], &["sampler.shift=1.5"], &["sampler.shift=3"]].map(|set| load(set).unwrap());
        assert!(own.to_toml().unwrap().contains("shift = 1.5"));
        assert_eq!(own.digest().unwrap(), said.digest().unwrap());
        assert_ne!(own.digest().unwrap(), other.digest().unwrap());

        std::fs::write(&file, r#"{"use_dynamic_shifting": true, "shift": 1.5}"#).unwrap();
        let error = load(&[]).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("use_dynamic_shifting = true: "), "{error}");
        let (set, note) = shift(&["sampler.shift=3"]).unwrap();
        assert_eq!(set, Some(3.0));
        assert!(note.is_some_and(|note| note.starts_with("sampler.shift = 3 is used, but ")
            && note.ends_with("with a constant shift and 1000 training timesteps")));
    }
}
