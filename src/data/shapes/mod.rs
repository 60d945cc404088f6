//! The embedded task `shapes`: a few coloured shapes on a dark ground, `two red circles left of a blue square`.
//!
//! GenEval (arXiv 2310.11513) in small, with its six tags. A prompt is one group of equal shapes, or two groups of different
//! shapes and how they lie to each other.

mod render;
mod sets;

pub use render::{GROUND, Object, SIDE, draw, layout, render};
pub use sets::{HELD_OUT_SHARE, is_held_out, prompts};

use crate::error::{Error, Result};
use std::fmt;

/// Names a variant's word in prompts, and finds the variant of a word.
macro_rules! words {
    ($type:ident, $($variant:ident = $word:literal),+) => {
        impl $type {
            /// All of them.
            pub const ALL: [$type; [$($word),+].len()] = [$($type::$variant),+];

            /// The word for it in a prompt.
            pub fn name(self) -> &'static str {
                match self {
                    $($type::$variant => $word),+
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

/// What is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Shape {
    /// A disc.
    Circle,
    /// A square on its side.
    Square,
    /// An equilateral triangle on its side.
    Triangle,
}
words!(Shape, Circle = "circle", Square = "square", Triangle = "triangle");

/// What it is drawn in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Colour {
    /// (235, 40, 40).
    Red,
    /// (40, 200, 70).
    Green,
    /// (50, 90, 245).
    Blue,
    /// (245, 215, 40).
    Yellow,
    /// (225, 40, 225).
    Magenta,
}
words!(Colour, Red = "red", Green = "green", Blue = "blue", Yellow = "yellow", Magenta = "magenta");

impl Colour {
    /// Its sRGB value.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Colour::Red => [235, 40, 40],
            Colour::Green => [40, 200, 70],
            Colour::Blue => [50, 90, 245],
            Colour::Yellow => [245, 215, 40],
            Colour::Magenta => [225, 40, 225],
        }
    }
}

/// How the first group lies to the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Relation {
    /// In any way.
    And,
    /// To its left.
    LeftOf,
    /// To its right.
    RightOf,
    /// Over it.
    Above,
    /// Under it.
    Below,
}
words!(Relation, And = "and", LeftOf = "left of", RightOf = "right of", Above = "above", Below = "below");

impl Relation {
    /// How the second lies to the first.
    pub fn inverse(self) -> Relation {
        match self {
            Relation::And => Relation::And,
            Relation::LeftOf => Relation::RightOf,
            Relation::RightOf => Relation::LeftOf,
            Relation::Above => Relation::Below,
            Relation::Below => Relation::Above,
        }
    }
}

/// The words for one to four.
pub const COUNTS: [&str; 4] = ["a", "two", "three", "four"];
/// The most shapes of a group that has another beside it.
pub const MOST_OF_TWO: usize = 2;

/// Some equal shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Group {
    /// How many, 1 to 4; beside another group 1 or 2.
    pub count: usize,
    /// Their colour, if it is said.
    pub colour: Option<Colour>,
    /// What they are.
    pub shape: Shape,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(COUNTS[self.count - 1])?;
        if let Some(colour) = self.colour {
            write!(f, " {colour}")?;
        }
        write!(f, " {}{}", self.shape, if self.count > 1 { "s" } else { "" })
    }
}

/// GenEval's kinds of prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tag {
    /// `a circle`.
    SingleObject,
    /// `a circle and two squares`.
    TwoObject,
    /// `three circles`, `three red circles`.
    Counting,
    /// `a red circle`.
    Colours,
    /// `a circle left of a square`, with or without colours and counts.
    Position,
    /// `a red circle and a blue square`.
    ColourAttribution,
}
words!(
    Tag,
    SingleObject = "single_object",
    TwoObject = "two_object",
    Counting = "counting",
    Colours = "colours",
    Position = "position",
    ColourAttribution = "colour_attribution"
);

/// What a prompt of the task asks for. [`Display`](fmt::Display) gives the prompt back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShapesPrompt {
    /// The first group.
    pub first: Group,
    /// How it lies to a second group, if there is one, and that group.
    pub second: Option<(Relation, Group)>,
}

impl fmt::Display for ShapesPrompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.first.fmt(f)?;
        match self.second {
            Some((relation, second)) => write!(f, " {relation} {second}"),
            None => Ok(()),
        }
    }
}

impl ShapesPrompt {
    /// Reads a prompt: `COUNT [COLOUR] SHAPE`, or two of them with `and`, `left of`, `right of`, `above` or `below` between.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the word that is not of the task, or what the prompt lacks.
    pub fn parse(prompt: &str) -> Result<ShapesPrompt> {
        let usage = |message: String| Error::Usage(format!("prompt {prompt:?}: {message}"));
        let words: Vec<&str> = prompt.split_whitespace().collect();
        let mut rest = words.as_slice();
        let first = group(&mut rest).map_err(usage)?;
        if rest.is_empty() {
            return Ok(ShapesPrompt { first, second: None });
        }
        let relation = relation(&mut rest).map_err(usage)?;
        let second = group(&mut rest).map_err(usage)?;
        if let Some(word) = rest.first() {
            return Err(usage(format!("{word:?} after the second group; at most two groups can be asked for")));
        }
        if first.shape == second.shape {
            return Err(usage(format!("two groups of {}s; groups must be of different shapes", first.shape)));
        }
        if let Some(group) = [first, second].iter().find(|group| group.count > MOST_OF_TWO) {
            let count = COUNTS[group.count - 1];
            return Err(usage(format!("{count} {}s beside another group; use a or two", group.shape)));
        }
        Ok(ShapesPrompt { first, second: Some((relation, second)) })
    }

    /// The groups, one or two.
    pub fn groups(&self) -> impl Iterator<Item = Group> {
        std::iter::once(self.first).chain(self.second.map(|(_, second)| second))
    }

    /// What it tests, in GenEval's terms.
    pub fn tag(&self) -> Tag {
        match self.second {
            Some((Relation::And, _)) if self.groups().any(|group| group.colour.is_some()) => Tag::ColourAttribution,
            Some((Relation::And, _)) => Tag::TwoObject,
            Some(_) => Tag::Position,
            None if self.first.count > 1 => Tag::Counting,
            None if self.first.colour.is_some() => Tag::Colours,
            None => Tag::SingleObject,
        }
    }
}

/// Takes a group from the front of `words`.
fn group(words: &mut &[&str]) -> std::result::Result<Group, String> {
    let word = take(words, "a count (a, two, three, four)")?;
    let count = COUNTS.iter().position(|count| *count == word || (word == "an" && *count == "a"));
    let count = count.ok_or_else(|| unknown("count", word, &COUNTS))? + 1;
    let mut word = take(words, "a shape")?;
    let colour = Colour::ALL.into_iter().find(|colour| colour.name() == word);
    if colour.is_some() {
        word = take(words, "a shape")?;
    }
    let singular = if count > 1 { word.strip_suffix('s').unwrap_or("") } else { word };
    let shape = Shape::ALL.into_iter().find(|shape| shape.name() == singular).ok_or_else(|| {
        let plural = if count > 1 { "s" } else { "" };
        let mut known: Vec<String> = Shape::ALL.iter().map(|shape| format!("{shape}{plural}")).collect();
        if colour.is_none() {
            known.extend(Colour::ALL.iter().map(Colour::to_string));
        }
        unknown(if colour.is_none() { "word" } else { "shape" }, word, &known)
    })?;
    Ok(Group { count, colour, shape })
}

/// Takes a relation from the front of `words`.
fn relation(words: &mut &[&str]) -> std::result::Result<Relation, String> {
    let word = take(words, "a relation")?;
    let found = Relation::ALL.into_iter().find(|relation| relation.name().split(' ').next() == Some(word));
    let found = found.ok_or_else(|| unknown("relation", word, &Relation::ALL.map(Relation::name)))?;
    if let Some((_, second)) = found.name().split_once(' ')
        && take(words, second)? != second
    {
        return Err(format!("{word:?} without {second:?}; write {:?}", found.name()));
    }
    Ok(found)
}

fn take<'a>(words: &mut &[&'a str], what: &str) -> std::result::Result<&'a str, String> {
    let (word, rest) = words.split_first().ok_or_else(|| {
        format!("ends where {what} must follow; write it as in \"two red circles left of a blue square\"")
    })?;
    *words = rest;
    Ok(word)
}

fn unknown(what: &str, word: &str, known: &[impl AsRef<str>]) -> String {
    let known: Vec<&str> = known.iter().map(AsRef::as_ref).collect();
    format!("unknown {what} {word:?}; use {}", known.join(", "))
}
