//! The base models, by the names that configurations call them.

use super::BaseModel;
use super::glyphs::Glyphs;
use super::sd35::Sd35;
use super::shapes::Shapes;
use crate::model::mmdit;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::ops::Deref;
use std::path::Path;
use std::sync::LazyLock;

/// Every base model, the one that a configuration means if it names none first. Another one is
/// added here.
static MODELS: [&dyn BaseModel; 5] =
    [&Glyphs, &Shapes, &Sd35(&mmdit::MEDIUM), &Sd35(&mmdit::LARGE), &Sd35(&mmdit::SD3_MEDIUM)];

/// `model.kind`: one of the base models.
#[derive(Clone, Copy)]
pub struct Kind(&'static dyn BaseModel);

impl Kind {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Kind> {
        MODELS.into_iter().map(Kind)
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Kind> {
        Self::all().find(|kind| kind.name() == name)
    }

    /// The one whose weights lie at `path`, if they can be read and are of any.
    pub fn of_files(path: &Path) -> Option<Kind> {
        Self::all().find(|kind| kind.owns(path))
    }
}

impl Default for Kind {
    fn default() -> Self {
        Kind(MODELS[0])
    }
}

impl Deref for Kind {
    type Target = dyn BaseModel;

    fn deref(&self) -> &Self::Target {
        self.0
    }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Kind {}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        static NAMES: LazyLock<Vec<&'static str>> = LazyLock::new(|| Kind::all().map(|kind| kind.name()).collect());
        let name = String::deserialize(deserializer)?;
        Kind::named(&name).ok_or_else(|| D::Error::unknown_variant(&name, &NAMES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_keys_are_those_of_the_configuration() {
        for (index, kind) in Kind::all().enumerate() {
            assert_eq!(Kind::all().position(|other| other == kind), Some(index), "{kind:?}");
            let known = include_str!("../../configs/reference.toml");
            for key in kind.keys() {
                let key = key.rsplit('.').next().unwrap();
                assert!(known.contains(&format!("\n{key} = ")) || known.contains(&format!("\n#{key} = ")), "{key}");
            }
        }
    }
}
