//! Which of a prompt's facts the objects of a picture bear out.

use super::Seen;
use crate::data::shapes::{Group, Relation, ShapesPrompt};

/// What a fact is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FactKind {
    /// There is an object of the group's shape.
    Shape,
    /// There are as many as the group has.
    Count,
    /// They have the group's colour.
    Colour,
    /// The groups lie to each other as they should.
    Relation,
    /// There is nothing else.
    NothingElse,
}

/// A fact, and how far it is right, in [0, 1].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fact {
    /// What it is about.
    pub kind: FactKind,
    /// 0 (wrong) to 1 (right).
    pub credit: f64,
}

/// The facts of a prompt: of each group that it is there, its count and, if it is said, its colour; the relation, if it is
/// said; and that there is nothing else. A group is found by its shape.
///
/// A count that is off by d of n has the credit max(0, 1 - d / n), as in the reward that Flow-GRPO trains on
/// (github.com/yifan123/reward-server, gen_eval.py); a colour the share of the group's shapes that have it.
pub fn facts(prompt: &ShapesPrompt, objects: &[Seen]) -> Vec<Fact> {
    let mut facts = Vec::new();
    let mut state = |kind, credit| facts.push(Fact { kind, credit });
    for group in prompt.groups() {
        let own = of(group, objects);
        let (found, wanted) = (own.len() as f64, group.count as f64);
        state(FactKind::Shape, right(!own.is_empty()));
        state(FactKind::Count, (1.0 - (found - wanted).abs() / wanted).max(0.0));
        if let Some(colour) = group.colour {
            let coloured = own.iter().filter(|object| object.colour == colour).count() as f64;
            state(FactKind::Colour, coloured / found.max(1.0));
        }
    }
    if let Some((relation, second)) = prompt.second
        && relation != Relation::And
    {
        let places = centre(&of(prompt.first, objects)).zip(centre(&of(second, objects)));
        state(FactKind::Relation, right(places.is_some_and(|(first, second)| lies(first, relation, second))));
    }
    let asked = |object: &Seen| prompt.groups().any(|group| object.shape == Some(group.shape));
    state(FactKind::NothingElse, right(objects.iter().all(asked)));
    facts
}

/// The mean credit.
pub fn credit(facts: &[Fact]) -> f64 {
    facts.iter().map(|fact| fact.credit).sum::<f64>() / facts.len() as f64
}

/// Whether every fact is right in full.
pub fn is_strict(facts: &[Fact]) -> bool {
    facts.iter().all(|fact| fact.credit == 1.0)
}

fn right(is: bool) -> f64 {
    f64::from(u8::from(is))
}

/// The objects of the group's shape.
fn of(group: Group, objects: &[Seen]) -> Vec<&Seen> {
    objects.iter().filter(|object| object.shape == Some(group.shape)).collect()
}

/// The mean of the objects' places.
fn centre(objects: &[&Seen]) -> Option<(f64, f64)> {
    let count = objects.len() as f64;
    let mean = |place: fn(&Seen) -> f64| objects.iter().map(|object| place(object)).sum::<f64>() / count;
    (!objects.is_empty()).then(|| (mean(|object| object.place.0), mean(|object| object.place.1)))
}

/// The least distance of two groups, as a share of the picture.
const APART: f64 = 0.1;

/// Whether `first` lies so to `second`: farther apart in that direction than across it.
fn lies(first: (f64, f64), relation: Relation, second: (f64, f64)) -> bool {
    let (dx, dy) = (second.0 - first.0, second.1 - first.1);
    let (towards, across) = match relation {
        Relation::LeftOf => (dx, dy),
        Relation::RightOf => (-dx, dy),
        Relation::Above => (dy, dx),
        Relation::Below => (-dy, dx),
        Relation::And => return true,
    };
    towards >= APART && towards > across.abs()
}
