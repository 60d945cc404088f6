//! GenEval's rules: does what a detector sees fulfil what the prompt asks for? Pure functions of detections.

use crate::data::geneval::{Object, Record, Relation, Tag};

/// Something a detector saw.
#[derive(Debug, Clone, PartialEq)]
pub struct Detection {
    /// Its class, by a name of [`OBJECTS`](crate::data::geneval::OBJECTS).
    pub class: String,
    /// Left, top, right and bottom, in pixels.
    pub bounds: [f64; 4],
    /// The detector's confidence, 0 to 1.
    pub confidence: f64,
    /// Its colour as classified, if it was.
    pub colour: Option<String>,
}

/// How well a picture fulfils its prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// What is trained on: the mean of the requirements' part marks (reward-server of Flow-GRPO). May be negative.
    pub reward: f64,
    /// Everything is right, with exact numbers.
    pub strict: bool,
    /// Everything is right by the benchmark's own rule, which does not mind more objects than asked for.
    pub correct: bool,
}

/// Confidence above which a detection counts; for prompts that ask for a number, the higher one.
const CONFIDENCE: f64 = 0.3;
const CONFIDENCE_COUNTING: f64 = 0.9;
/// Of a class, so many of the most confident count.
const MOST: usize = 16;
/// Distances of centres below this share of the objects' sizes do not count.
const POSITION_THRESHOLD: f64 = 0.1;

/// Judges the detections of one picture.
///
/// Part marks, whose mean is the reward. For each object: `1 - |n - found| / n`. If a colour is asked for: the same for the
/// number of that colour, or 0 if not exactly n objects were found. For a position: 0 if it is not reached, followed by 1 in
/// any case, as in the program whose numbers are compared; so a position is worth a half.
pub fn verdict(record: &Record, detections: &[Detection]) -> Verdict {
    let least = if record.tag == Tag::Counting { CONFIDENCE_COUNTING } else { CONFIDENCE };
    let found = |class: &str| {
        let mut found: Vec<&Detection> =
            detections.iter().filter(|seen| seen.class == class && seen.confidence > least).collect();
        found.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
        found.truncate(MOST);
        found
    };
    let (marks, strict) = strict(record, found);
    let reward = marks.iter().sum::<f64>() / marks.len().max(1) as f64;
    Verdict { reward, strict, correct: correct(record, found) }
}

/// The part marks, and whether every number, colour and position is right.
fn strict<'a>(record: &Record, found: impl Fn(&str) -> Vec<&'a Detection>) -> (Vec<f64>, bool) {
    let mut marks = Vec::new();
    let mut groups: Vec<Option<Vec<&Detection>>> = Vec::new();
    let mark = |wanted: usize, found: usize| 1.0 - wanted.abs_diff(found) as f64 / wanted as f64;
    for object in &record.include {
        let seen = found(&object.class);
        marks.push(mark(object.count, seen.len()));
        let mut matched = seen.len() == object.count;
        if !matched && (object.colour.is_some() || object.position.is_some()) {
            marks.push(0.0);
        }
        if let Some(colour) = object.colour.as_ref().filter(|_| matched) {
            let coloured = coloured(&seen, colour);
            marks.push(mark(object.count, coloured));
            matched = coloured == object.count;
        }
        if let Some((relation, target)) = object.position.filter(|_| matched) {
            matched = placed(&seen, relation, groups[target].as_deref());
            if !matched {
                marks.push(0.0);
            }
            if groups[target].is_some() {
                marks.push(1.0);
            }
        }
        groups.push(matched.then_some(seen));
    }
    let right = groups.iter().all(Option::is_some);
    (marks, right)
}

/// The benchmark's rule (evaluation/evaluate_images.py): at least so many, of which as many as asked for are looked at;
/// and less than what is excluded.
fn correct<'a>(record: &Record, found: impl Fn(&str) -> Vec<&'a Detection>) -> bool {
    let mut groups: Vec<Option<Vec<&Detection>>> = Vec::new();
    for Object { class, count, colour, position } in &record.include {
        let mut seen = found(class);
        seen.truncate(*count);
        let enough = seen.len() == *count;
        let right_colour = colour.as_ref().is_none_or(|colour| coloured(&seen, colour) >= *count);
        let right_place =
            || position.is_none_or(|(relation, target)| placed(&seen, relation, groups[target].as_deref()));
        let matched = enough && right_colour && right_place();
        groups.push(matched.then_some(seen));
    }
    groups.iter().all(Option::is_some) && record.exclude.iter().all(|object| found(&object.class).len() < object.count)
}

fn coloured(seen: &[&Detection], colour: &str) -> usize {
    seen.iter().filter(|object| object.colour.as_deref() == Some(colour)).count()
}

/// Whether every object lies so from every target; no target, no position.
fn placed(seen: &[&Detection], relation: Relation, targets: Option<&[&Detection]>) -> bool {
    targets.is_some_and(|targets| {
        seen.iter().all(|object| targets.iter().all(|target| lies(object.bounds, relation, target.bounds)))
    })
}

/// Whether box `a` lies so from box `b`: the offset of their centres, less a tenth of their sizes, mostly that way.
fn lies(a: [f64; 4], relation: Relation, b: [f64; 4]) -> bool {
    let centre = |x: [f64; 4], axis: usize| (x[axis] + x[axis + 2]) / 2.0;
    let size = |x: [f64; 4], axis: usize| (x[axis + 2] - x[axis]).abs();
    let offset = [0, 1].map(|axis| centre(a, axis) - centre(b, axis));
    let beyond = [0, 1].map(|axis| {
        let slack = POSITION_THRESHOLD * (size(a, axis) + size(b, axis));
        (offset[axis].abs() - slack).max(0.0).copysign(offset[axis])
    });
    if beyond.iter().all(|distance| distance.abs() < 1e-3) {
        return false;
    }
    let length = offset[0].hypot(offset[1]);
    let [x, y] = beyond.map(|distance| distance / length);
    match relation {
        Relation::LeftOf => x < -0.5,
        Relation::RightOf => x > 0.5,
        Relation::Above => y < -0.5,
        Relation::Below => y > 0.5,
    }
}
