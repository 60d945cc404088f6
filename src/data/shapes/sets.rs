//! The prompts of the task `shapes`: what is trained on, what is held out, and prompts with a fact changed.

use super::render::Chance;
use super::{COUNTS, Colour, Group, MOST_OF_TWO, Relation, Shape, ShapesPrompt, Tag};
use crate::data::Split;
use crate::data::glyphs::splitmix64;
use std::collections::BTreeSet;
use std::sync::LazyLock;

/// One in so many combinations of a tag is held out for evaluation, and at least one.
pub const HELD_OUT_SHARE: usize = 6;
/// Prompts of each tag that are evaluated; where fewer are held out they come again.
const EVALUATED: usize = 20;

impl Tag {
    /// Prompts of the tag among those that are trained on: the shares of Flow-GRPO's GenEval set (arXiv 2505.05470, position :
    /// counting : attribution : colours : two = 7 : 5 : 3 : 1 : 1), and half a share for single objects.
    fn trained(self) -> usize {
        match self {
            Tag::Position => 700,
            Tag::Counting => 500,
            Tag::ColourAttribution => 300,
            Tag::Colours | Tag::TwoObject => 100,
            Tag::SingleObject => 50,
        }
    }

    /// Its combinations.
    fn all(self) -> Vec<ShapesPrompt> {
        let colours = || std::iter::once(None).chain(Colour::ALL.map(Some));
        let groups = |counts: std::ops::RangeInclusive<usize>| {
            counts.flat_map(move |count| {
                let of_colour = move |colour| Shape::ALL.map(|shape| Group { count, colour, shape });
                colours().flat_map(of_colour)
            })
        };
        let one = groups(1..=COUNTS.len()).map(|first| ShapesPrompt { first, second: None });
        let pairs = groups(1..=MOST_OF_TWO).flat_map(|first| {
            let seconds = groups(1..=MOST_OF_TWO).filter(move |second| {
                let both = first.colour.is_some() == second.colour.is_some();
                let different =
                    first.shape != second.shape && (first.colour != second.colour || first.colour.is_none());
                both && different && first.count + second.count <= 3
            });
            seconds.flat_map(move |second| {
                Relation::ALL.map(|relation| ShapesPrompt { first, second: Some((relation, second)) })
            })
        });
        one.chain(pairs).filter(|prompt| prompt.tag() == self).collect()
    }
}

/// The task's prompts to train on or to evaluate, tag by tag. Prompts come again where a tag has few.
pub fn prompts(split: Split) -> impl Iterator<Item = ShapesPrompt> {
    Tag::ALL.into_iter().flat_map(move |tag| {
        let mut of_split: Vec<_> =
            tag.all().into_iter().filter(|prompt| is_held_out(prompt) == (split == Split::Eval)).collect();
        of_split.sort_by_key(|prompt| (hash(&prompt.to_string()), *prompt));
        let count = match split {
            Split::Train => tag.trained(),
            Split::Eval => EVALUATED,
        };
        of_split.into_iter().cycle().take(count).collect::<Vec<_>>()
    })
}

/// Whether training never shows a prompt's combination of groups and relation, said in either order.
pub fn is_held_out(prompt: &ShapesPrompt) -> bool {
    static HELD_OUT: LazyLock<BTreeSet<ShapesPrompt>> = LazyLock::new(|| {
        let of_tag = |tag: Tag| {
            let combinations: BTreeSet<_> = tag.all().iter().map(ShapesPrompt::combination).collect();
            let mut combinations: Vec<_> = combinations.into_iter().collect();
            combinations.sort_by_key(|prompt| (hash(&prompt.to_string()), *prompt));
            combinations.truncate((combinations.len() / HELD_OUT_SHARE).max(1));
            combinations
        };
        Tag::ALL.into_iter().flat_map(of_tag).collect()
    });
    HELD_OUT.contains(&prompt.combination())
}

impl ShapesPrompt {
    /// The one prompt of all that say the same.
    fn combination(&self) -> ShapesPrompt {
        let Some((relation, second)) = self.second else { return *self };
        let swapped = ShapesPrompt { first: second, second: Some((relation.inverse(), self.first)) };
        match relation {
            Relation::RightOf | Relation::Below => swapped,
            Relation::And => swapped.min(*self),
            Relation::LeftOf | Relation::Above => *self,
        }
    }

    /// What else a picture could show that has one fact of this prompt wrong: a count, a colour, a shape, the relation, the
    /// colours of the two groups exchanged, or the second group missing. `style` chooses.
    pub fn with_a_wrong_fact(&self, style: u64) -> ShapesPrompt {
        let mut chance = Chance(style);
        let mut wrong: Vec<ShapesPrompt> = Vec::new();
        let most = if self.second.is_some() { MOST_OF_TWO } else { COUNTS.len() };
        for place in 0..self.groups().count() {
            let other = |change: &dyn Fn(&mut Group)| {
                let mut prompt = *self;
                match &mut prompt.second {
                    Some((_, second)) if place == 1 => change(second),
                    _ => change(&mut prompt.first),
                }
                prompt
            };
            let group = self.groups().nth(place).unwrap_or(self.first);
            let count = 1 + (group.count + chance.below(most - 1)) % most;
            wrong.push(other(&|group| group.count = count));
            let shapes: Vec<_> =
                Shape::ALL.into_iter().filter(|s| self.groups().all(|group| group.shape != *s)).collect();
            let shape = shapes[chance.below(shapes.len())];
            wrong.push(other(&|group| group.shape = shape));
            if let Some(colour) = group.colour {
                let colour =
                    Colour::ALL[(colour as usize + 1 + chance.below(Colour::ALL.len() - 1)) % Colour::ALL.len()];
                wrong.push(other(&|group| group.colour = Some(colour)));
            }
        }
        if let Some((relation, second)) = self.second {
            wrong.push(ShapesPrompt { second: None, ..*self });
            if relation != Relation::And {
                let others: Vec<_> = Relation::ALL[1..].iter().filter(|other| **other != relation).collect();
                let relation = *others[chance.below(others.len())];
                wrong.push(ShapesPrompt { second: Some((relation, second)), ..*self });
            }
            if self.first.colour != second.colour {
                let first = Group { colour: second.colour, ..self.first };
                let second = Group { colour: self.first.colour, ..second };
                wrong.push(ShapesPrompt { first, second: Some((relation, second)) });
            }
        }
        wrong[chance.below(wrong.len())]
    }
}

/// A number of a text that looks random: FNV-1a, then SplitMix64.
fn hash(text: &str) -> u64 {
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    splitmix64(text.bytes().fold(0xcbf2_9ce4_8422_2325, fnv))
}
