//! JSON whose objects name each key once: of two values only one would count, and which one nobody sees.

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::fmt;

/// A JSON value; an object that names a key twice, at any depth, is refused with the key.
pub(super) struct Unique(pub Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reading).map(Unique)
    }
}

/// Reads any value.
struct Reading;

impl<'de> Visitor<'de> for Reading {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Unique(value)) = seq.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format!("names the key {key:?} twice; keep one of them")));
            }
            let Unique(value) = map.next_value()?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_a_key_named_twice_is_read_as_by_the_parser() {
        for text in [
            r#"{"b": [1, -2, 2.5, 18446744073709551615, 1e300], "a": {"x": null, "y": [true, "t\u00e9"]}, "é": {}}"#,
            r#"[[], {}, "", 0.1, 0.30000000000000004]"#,
            "7",
        ] {
            let plain: Value = serde_json::from_str(text).unwrap();
            let Unique(ours) = serde_json::from_str(text).unwrap();
            assert_eq!(ours, plain);
            assert_eq!(ours.to_string(), plain.to_string(), "the order of keys");
        }
        for (text, key) in [(r#"{"a": 1, "a": 1}"#, "a"), (r#"[{"x": [{"b": 1, "c": 2, "b": 3}]}]"#, "b")] {
            let refused = serde_json::from_str::<Unique>(text).err().unwrap().to_string();
            assert!(refused.starts_with(&format!("names the key {key:?} twice; keep one of them")), "{refused}");
        }
    }
}
