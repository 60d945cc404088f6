//! Prompts in the manner of GenEval: a few templates over 80 objects, 10 colours, 4 relations and small numbers, with a record
//! of what must be seen (djghosh13/geneval, prompts/create_prompts.py, MIT licence, Copyright (c) 2023 Dhruba Ghosh: the
//! templates and the names).

use super::{Metadata, Prompt};
use crate::error::{Error, Result};
use crate::rng::{Purpose, Stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::HashSet;

/// The classes of COCO by the names of the benchmark.
#[rustfmt::skip]
pub const OBJECTS: [&str; 80] = [
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
];

/// The colours that objects are asked for in.
pub const COLOURS: [&str; 10] =
    ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"];

/// A kind of prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tag {
    /// "a photo of a bench".
    SingleObject,
    /// "a photo of a bench and a snowboard".
    TwoObject,
    /// "a photo of three benches".
    Counting,
    /// "a photo of a red bench".
    Colors,
    /// "a photo of a bench left of a bear".
    Position,
    /// "a photo of a red bench and a blue bear".
    ColorAttr,
}

impl Tag {
    /// What is trained on and how often, in seventeenths (Flow-GRPO, dataset/merge_genevaltask.py: .7, .5, .3, .1, .1).
    const TRAINED: [(Tag, usize); 5] =
        [(Tag::Position, 7), (Tag::Counting, 5), (Tag::ColorAttr, 3), (Tag::Colors, 1), (Tag::TwoObject, 1)];
}

/// Where an object lies from another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Relation {
    /// To its left.
    #[serde(rename = "left of")]
    LeftOf,
    /// To its right.
    #[serde(rename = "right of")]
    RightOf,
    /// Above it.
    #[serde(rename = "above")]
    Above,
    /// Below it.
    #[serde(rename = "below")]
    Below,
}

impl Relation {
    const ALL: [Relation; 4] = [Relation::LeftOf, Relation::RightOf, Relation::Above, Relation::Below];

    fn name(self) -> &'static str {
        match self {
            Relation::LeftOf => "left of",
            Relation::RightOf => "right of",
            Relation::Above => "above",
            Relation::Below => "below",
        }
    }
}

/// Objects that must be in the picture.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Object {
    /// One of [`OBJECTS`].
    pub class: String,
    /// How many.
    pub count: usize,
    /// One of [`COLOURS`].
    #[serde(rename = "color", skip_serializing_if = "Option::is_none")]
    pub colour: Option<String>,
    /// How they lie relative to an earlier object of the list, given by its place in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<(Relation, usize)>,
}

impl Object {
    fn new(class: &str, count: usize) -> Object {
        Object { class: class.to_string(), count, colour: None, position: None }
    }

    /// "a red bench".
    fn described(&self) -> String {
        let name = self.colour.iter().map(String::as_str).chain([self.class.as_str()]).collect::<Vec<_>>().join(" ");
        let article = if name.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        format!("{article} {name}")
    }
}

/// What a prompt asks for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// The kind of prompt.
    pub tag: Tag,
    /// What must be seen.
    pub include: Vec<Object>,
    /// What must not: that many or more of a class.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<Object>,
}

impl Record {
    /// The record among a prompt's metadata; `None` where there is none (no `tag` or no `include`).
    ///
    /// # Errors
    /// [`Error::Usage`] for one that is not of this form, or has a position that refers to no earlier object.
    pub fn of(metadata: &Metadata) -> Result<Option<Record>> {
        if !metadata.contains_key("tag") || !metadata.contains_key("include") {
            return Ok(None);
        }
        let bad =
            |message: String| Error::Usage(format!("GenEval record {}: {message}", Value::from((**metadata).clone())));
        let record: Record =
            serde_json::from_value(Value::from((**metadata).clone())).map_err(|error| bad(error.to_string()))?;
        let target = |(i, object): (usize, &Object)| object.position.is_some_and(|(_, target)| target >= i);
        if record.include.iter().enumerate().any(target) {
            return Err(bad("a position refers to an object that does not stand before its own".to_string()));
        }
        if record.include.iter().chain(&record.exclude).any(|object| object.count == 0) {
            return Err(bad("a count of 0; use 1 or more".to_string()));
        }
        Ok(Some(record))
    }

    /// The benchmark's text for it.
    pub fn prompt(&self) -> String {
        const NUMBERS: [&str; 5] = ["zero", "one", "two", "three", "four"];
        let first = &self.include[0];
        let what = match self.tag {
            Tag::Counting => {
                let plural = if first.class.ends_with('s') { "es" } else { "s" };
                format!("{} {}{plural}", NUMBERS[first.count], first.class)
            }
            Tag::Position => {
                let second = &self.include[1];
                let relation = second.position.map_or("beside", |(relation, _)| relation.name());
                format!("{} {relation} {}", second.described(), first.described())
            }
            _ => self.include.iter().map(Object::described).collect::<Vec<_>>().join(" and "),
        };
        format!("a photo of {what}")
    }

    /// A record that is equal for prompts that differ only in the order of their objects.
    fn key(&self) -> Record {
        let mut key = self.clone();
        if self.tag != Tag::Position {
            key.include.sort_by(|a, b| (&a.class, &a.colour).cmp(&(&b.class, &b.colour)));
        }
        key
    }

    /// Draws a record from the words of a stream.
    fn draw(stream: Stream) -> Record {
        const NOBODY: usize = 1; // "person", the first object, is asked for in no colour
        let seventeenth = stream.below(0, Tag::TRAINED.iter().map(|(_, share)| share).sum());
        let mut end = 0;
        let reached = |&&(_, share): &&(Tag, usize)| {
            end += share;
            seventeenth < end
        };
        let tag = Tag::TRAINED.iter().find(reached).map_or(Tag::Position, |&(tag, _)| tag);
        let first = |from: usize| from + stream.below(1, OBJECTS.len() - from);
        // Another one than the first: the next of a circle of the others.
        let other = |i: usize, word: u32, from: usize, len: usize| {
            from + (i - from + 1 + stream.below(word, len - from - 1)) % (len - from)
        };
        let coloured = |object: usize, colour: usize| Object {
            colour: Some(COLOURS[colour].to_string()),
            ..Object::new(OBJECTS[object], 1)
        };
        let mut exclude = Vec::new();
        let include = match tag {
            Tag::SingleObject => vec![Object::new(OBJECTS[first(0)], 1)],
            Tag::TwoObject => {
                let a = first(0);
                vec![Object::new(OBJECTS[a], 1), Object::new(OBJECTS[other(a, 2, 0, OBJECTS.len())], 1)]
            }
            Tag::Counting => {
                let (a, count) = (first(0), 2 + stream.below(2, 3));
                exclude.push(Object::new(OBJECTS[a], count + 1));
                vec![Object::new(OBJECTS[a], count)]
            }
            Tag::Colors => vec![coloured(first(NOBODY), stream.below(2, COLOURS.len()))],
            Tag::Position => {
                let a = first(0);
                let relation = Relation::ALL[stream.below(3, Relation::ALL.len())];
                let placed = Object::new(OBJECTS[other(a, 2, 0, OBJECTS.len())], 1);
                vec![Object::new(OBJECTS[a], 1), Object { position: Some((relation, 0)), ..placed }]
            }
            Tag::ColorAttr => {
                let (a, colour) = (first(NOBODY), stream.below(3, COLOURS.len()));
                let b = other(a, 2, NOBODY, OBJECTS.len());
                vec![coloured(a, colour), coloured(b, other(colour, 4, 0, COLOURS.len()))]
            }
        };
        Record { tag, include, exclude }
    }

    /// The line of a prompt file: `{"tag": ..., "include": [...], "prompt": "..."}`.
    ///
    /// # Errors
    /// None that a record can cause.
    pub fn line(&self) -> Result<String> {
        let failed = |error: serde_json::Error| Error::Failed(format!("a prompt cannot be written: {error}"));
        let mut value = serde_json::to_value(self).map_err(failed)?;
        value["prompt"] = self.prompt().into();
        Ok(value.to_string())
    }
}

/// `count` records for training: position, counting, two colours, one colour and two objects, 7 : 5 : 3 : 1 : 1, drawn
/// independently. None asks for the same as a prompt of `without`, in whatever order. Records may repeat: there are only
/// 240 ways to ask for a number of things.
///
/// # Errors
/// [`Error::Usage`] for a bad record in `without`, or if it leaves nothing to draw.
pub fn train_records(count: usize, seed: u64, without: &[Prompt]) -> Result<Vec<Record>> {
    const TRIES: u64 = 1000;
    let texts: HashSet<&str> = without.iter().map(|prompt| &*prompt.text).collect();
    let records = without.iter().filter_map(|prompt| prompt.metadata.as_ref());
    let records = records.filter_map(|metadata| Record::of(metadata).transpose()).map(|record| Ok(record?.key()));
    let keys = records.collect::<Result<HashSet<_>>>()?;
    let one = |i: usize| {
        let drawn = (0..TRIES).map(|again| Record::draw(Stream::new(seed, Purpose::GenEval, [i as u64, again, 0, 0])));
        let mut free =
            drawn.filter(|record| !keys.contains(&record.key()) && !texts.contains(record.prompt().as_str()));
        free.next().ok_or_else(|| Error::Usage("--without leaves no prompt to draw; exclude fewer".to_string()))
    };
    (0..count).map(one).collect()
}
