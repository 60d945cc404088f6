//! Sections of a configuration whose key `name` decides which other keys they have.
//!
//! Every variant is a type of its own, which [`variants!`] lists once with its name. A section is read name first, then by
//! the name's type as part of the same deserialization: what is wrong is known by its key. A key that is another
//! variant's is refused with the names of its owners, which the types' own fields tell.

use serde::de::value::{Error as KeysError, MapAccessDeserializer};
use serde::de::{DeserializeOwned, DeserializeSeed, Error, IntoDeserializer, MapAccess, Visitor};
use serde::ser::{Error as _, SerializeMap};
use serde::{Deserializer, Serialize, Serializer, forward_to_deserialize_any};
use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;
use toml::{Table, Value};

/// The key that decides what the others are.
pub(crate) const NAME: &str = "name";

/// An enum of [`variants!`].
pub(crate) trait Variants: Sized {
    /// The names of the variants.
    const NAMES: &'static [&'static str];

    /// The variant's name.
    fn name(&self) -> &'static str;

    /// The variant of this name's type and keys.
    fn fields(name: &str) -> (&'static str, &'static [&'static str]);

    /// The keys of the variant of this name.
    fn keys(name: &str) -> &'static [&'static str] {
        Self::fields(name).1
    }

    /// What to do about a key that is only `owner`'s, or another's too.
    fn remedy(owner: &str) -> String;

    /// Reads the keys of the variant of this name.
    fn read<'de, D: Deserializer<'de>>(name: &str, keys: D) -> Result<Self, D::Error>;

    /// Its keys with their values.
    fn table(&self) -> Result<Table, toml::ser::Error>;
}

/// Keys beside the name that every variant of a section has.
pub(crate) trait Common: Default + Serialize {
    /// The keys.
    const KEYS: &'static [&'static str];

    /// Takes the value of one of them.
    fn read<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error>;
}

/// No such keys.
#[derive(Default, Serialize)]
pub(crate) struct NoCommon {}

impl Common for NoCommon {
    const KEYS: &'static [&'static str] = &[];

    fn read<'de, A: MapAccess<'de>>(&mut self, _key: &str, _map: &mut A) -> Result<(), A::Error> {
        Ok(())
    }
}

/// Makes an enum of the variants of a section, which dereferences to what all of them can tell, and one of their names alone.
macro_rules! variants {
    (
        $(#[$kinds:meta])* kinds $Kinds:ident;
        $(#[$meta:meta])* variants $Variants:ident of dyn $Spec:ident;
        remedy $remedy:expr;
        $($(#[$doc:meta])* $name:literal => $Variant:ident($Type:ty),)+
    ) => {
        $(#[$kinds])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $Kinds {
            $($(#[$doc])* $Variant,)+
        }

        impl $Kinds {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$Variant),+];

            /// The name in the configuration.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$Variant => $name,)+
                }
            }
        }

        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq)]
        pub enum $Variants {
            $($(#[$doc])* $Variant($Type),)+
        }

        impl $Variants {
            /// With the defaults of all keys.
            pub fn of(kind: $Kinds) -> Self {
                match kind {
                    $($Kinds::$Variant => Self::$Variant(Default::default()),)+
                }
            }

            /// Which one it is.
            pub fn kind(&self) -> $Kinds {
                match self {
                    $(Self::$Variant(_) => $Kinds::$Variant,)+
                }
            }
        }

        impl std::ops::Deref for $Variants {
            type Target = dyn $Spec;

            fn deref(&self) -> &Self::Target {
                match self {
                    $(Self::$Variant(own) => own,)+
                }
            }
        }

        impl std::ops::DerefMut for $Variants {
            fn deref_mut(&mut self) -> &mut Self::Target {
                match self {
                    $(Self::$Variant(own) => own,)+
                }
            }
        }

        $(impl From<$Type> for $Variants {
            fn from(own: $Type) -> Self {
                Self::$Variant(own)
            }
        })+

        impl $crate::variants::Variants for $Variants {
            const NAMES: &'static [&'static str] = &[$($name),+];

            fn name(&self) -> &'static str {
                self.kind().name()
            }

            fn fields(name: &str) -> (&'static str, &'static [&'static str]) {
                match name {
                    $($name => $crate::variants::fields::<$Type>(),)+
                    _ => ("", &[]),
                }
            }

            fn remedy(owner: &str) -> String {
                $remedy(owner)
            }

            fn read<'de, D: serde::Deserializer<'de>>(name: &str, keys: D) -> std::result::Result<Self, D::Error> {
                match name {
                    $($name => serde::Deserialize::deserialize(keys).map(Self::$Variant),)+
                    _ => Err(serde::de::Error::unknown_variant(name, Self::NAMES)),
                }
            }

            fn table(&self) -> std::result::Result<toml::Table, toml::ser::Error> {
                match self {
                    $(Self::$Variant(own) => toml::Table::try_from(own),)+
                }
            }
        }
    };
}
pub(crate) use variants;

/// Reads a section.
pub(crate) fn read<'de, V: Variants, C: Common, D: Deserializer<'de>>(section: D) -> Result<(V, C), D::Error> {
    section.deserialize_map(Section(PhantomData))
}

/// Writes a section, name first.
pub(crate) fn write<V: Variants, C: Common, S: Serializer>(
    variant: &V,
    common: &C,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let common = Table::try_from(common).map_err(S::Error::custom)?;
    let own = variant.table().map_err(S::Error::custom)?;
    let mut map = serializer.serialize_map(None)?;
    map.serialize_entry(NAME, variant.name())?;
    for (key, value) in common.iter().chain(&own) {
        map.serialize_entry(key, value)?;
    }
    map.end()
}

struct Section<V, C>(PhantomData<(V, C)>);

impl<'de, V: Variants, C: Common> Visitor<'de> for Section<V, C> {
    type Value = (V, C);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a section with keys of its own")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let name = match map.next_key::<String>()? {
            Some(key) if key == NAME => map.next_value_seed(OneOf(V::NAMES))?,
            Some(key) => return read_reordered(key, map),
            None => return Err(A::Error::missing_field(NAME)),
        };
        let mut common = C::default();
        let keys = Keys { name, map, common: &mut common, variants: PhantomData::<V> };
        let variant = V::read(name, MapAccessDeserializer::new(keys))?;
        Ok((variant, common))
    }
}

/// Reads a section in which other keys stand before the name; what is wrong is known without its key
/// ([`crate::config`] puts the name first).
fn read_reordered<'de, V: Variants, C: Common, A: MapAccess<'de>>(
    first: String,
    mut map: A,
) -> Result<(V, C), A::Error> {
    let mut table = Table::from_iter([(first, map.next_value()?)]);
    while let Some((key, value)) = map.next_entry::<String, Value>()? {
        table.insert(key, value);
    }
    if !table.contains_key(NAME) {
        return Err(A::Error::missing_field(NAME));
    }
    name_first(&mut table);
    read(Value::Table(table)).map_err(|e: toml::de::Error| A::Error::custom(e.message()))
}

/// Puts the name, which decides what the other keys of a section are, before them.
pub(crate) fn name_first(section: &mut Table) {
    if let Some(name) = section.remove(NAME) {
        let rest = std::mem::replace(section, Table::from_iter([(NAME.to_owned(), name)]));
        section.extend(rest);
    }
}

/// A name of a list.
struct OneOf(&'static [&'static str]);

impl<'de> DeserializeSeed<'de> for OneOf {
    type Value = &'static str;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for OneOf {
    type Value = &'static str;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name in quotes")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Self::Value, E> {
        let known = self.0.iter().find(|known| **known == name);
        known.copied().ok_or_else(|| E::unknown_variant(name, self.0))
    }
}

/// The keys after the name: those that all variants have go to `common`, the variant's own to its type.
struct Keys<'a, V, C, A> {
    name: &'static str,
    map: A,
    common: &'a mut C,
    variants: PhantomData<V>,
}

impl<'de, V: Variants, C: Common, A: MapAccess<'de>> MapAccess<'de> for Keys<'_, V, C, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        while let Some(key) = self.map.next_key::<String>()? {
            if V::keys(self.name).contains(&&*key) {
                return seed.deserialize(key.into_deserializer()).map(Some);
            }
            if !C::KEYS.contains(&&*key) {
                // As the value's error, which is known by the key.
                self.map.next_value_seed(Refused(refusal::<V, C>(self.name, &key)))?;
            }
            self.common.read(&key, &mut self.map)?;
        }
        Ok(None)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}

/// What is wrong with a key that the variant of this name does not have.
fn refusal<V: Variants, C: Common>(name: &str, key: &str) -> String {
    let owners: Vec<&str> = V::NAMES.iter().copied().filter(|name| V::keys(name).contains(&key)).collect();
    match owners[..] {
        [first, ..] => format!("belongs to {}; {}", owners.join(", "), V::remedy(first)),
        [] => {
            // In the words of serde, which the reader of a configuration takes apart.
            let known = [NAME].iter().chain(C::KEYS).chain(V::keys(name)).map(|key| format!("`{key}`"));
            format!("unknown field `{key}`, expected one of {}", known.collect::<Vec<_>>().join(", "))
        }
    }
}

/// A value that is refused whatever it is.
struct Refused(String);

impl<'de> DeserializeSeed<'de> for Refused {
    type Value = Infallible;

    fn deserialize<D: Deserializer<'de>>(self, _value: D) -> Result<Infallible, D::Error> {
        Err(D::Error::custom(self.0))
    }
}

/// The struct that holds the keys of a section of the type T, and the keys: what it asks its deserializer for.
pub(crate) fn fields<T: DeserializeOwned>() -> (&'static str, &'static [&'static str]) {
    let mut fields: (&str, &[&str]) = ("", &[]);
    T::deserialize(Fields(&mut fields)).err(); // it gets no value, ever
    fields
}

struct Fields<'a>(&'a mut (&'static str, &'static [&'static str]));

impl<'de> Deserializer<'de> for Fields<'_> {
    type Error = KeysError;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, KeysError> {
        *self.0 = (name, fields);
        Err(Error::custom("only its keys are asked for"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, KeysError> {
        Err(Error::custom("only a struct has keys"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
