//! Draws the pictures of the task `shapes`.

use super::{Colour, Group, Relation, Shape, ShapesPrompt};

/// Height and width of a picture in pixels.
pub const SIDE: usize = 32;
/// What everything is drawn on.
pub const GROUND: [u8; 3] = [16, 16, 16];

/// From the middle of the picture to the middle of a quarter, in pixels.
const STEP: f64 = 7.5;
/// How far a shape that is not alone may lie from its place, in pixels, across and down.
const JITTER: f64 = 0.75;
/// A pixel is the mean of so many times so many points.
const POINTS: usize = 4;

/// A shape at its place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Object {
    /// What it is.
    pub shape: Shape,
    /// Its colour.
    pub colour: Colour,
    /// The middle of its extent, from the left, in pixels.
    pub x: f64,
    /// The middle of its extent, from the top, in pixels.
    pub y: f64,
    /// Its size: a circle's radius; a square's side is 1.8, a triangle's 2.08 times as long.
    pub size: f64,
    /// How far it is turned, in radians.
    pub turn: f64,
}

impl Object {
    /// Whether it covers a point.
    fn covers(&self, x: f64, y: f64) -> bool {
        let (dx, dy) = ((x - self.x) / self.size, (y - self.y) / self.size);
        if dx * dx + dy * dy > 2.0 {
            return false; // farther off than any corner
        }
        let (sin, cos) = self.turn.sin_cos();
        let (x, y) = (cos * dx + sin * dy, cos * dy - sin * dx);
        match self.shape {
            Shape::Circle => x * x + y * y <= 1.0,
            Shape::Square => x.abs().max(y.abs()) <= 0.9,
            // Corners 1.2 from the centroid, which lies 0.3 below the middle of the extent.
            Shape::Triangle => {
                let y = y - 0.3;
                y <= 0.6 && 3f64.sqrt() / 2.0 * x.abs() - y / 2.0 <= 0.6
            }
        }
    }
}

/// Draws a prompt: RGB `[3, SIDE, SIDE]` in [0, 1], row-major, antialiased.
///
/// `style` is the caller's (random) number: places, sizes and what the prompt leaves open follow from it. The same arguments
/// give the same picture, bit for bit.
pub fn render(prompt: &ShapesPrompt, style: u64) -> Vec<f32> {
    draw(&layout(prompt, style))
}

/// The picture `[3, SIDE, SIDE]` of some objects; where they overlap the last one is seen.
pub fn draw(objects: &[Object]) -> Vec<f32> {
    let mut sum = vec![0f32; 3 * SIDE * SIDE];
    for (pixel, (row, column)) in (0..SIDE).flat_map(|row| (0..SIDE).map(move |column| (row, column))).enumerate() {
        for point in 0..POINTS * POINTS {
            let at = |cell: usize, part: usize| cell as f64 + (part as f64 + 0.5) / POINTS as f64;
            let (x, y) = (at(column, point % POINTS), at(row, point / POINTS));
            let seen = objects.iter().rev().find(|object| object.covers(x, y));
            let colour = seen.map_or(GROUND, |object| object.colour.rgb());
            for (channel, value) in colour.into_iter().enumerate() {
                sum[channel * SIDE * SIDE + pixel] += f32::from(value);
            }
        }
    }
    sum.iter().map(|sum| sum / (255 * POINTS * POINTS) as f32).collect()
}

/// Where the objects of a prompt lie.
pub fn layout(prompt: &ShapesPrompt, style: u64) -> Vec<Object> {
    let mut chance = Chance(style);
    let middle = SIDE as f64 / 2.0;
    let places = match prompt.second {
        None => vec![alone(prompt.first.count, &mut chance)],
        Some((relation, second)) => {
            let relation = match relation {
                Relation::And => Relation::ALL[1 + chance.below(4)],
                relation => relation,
            };
            let beside = |count: usize, towards: f64, chance: &mut Chance| -> Vec<(f64, f64)> {
                let across = match count {
                    1 => vec![chance.between(-3.0, 3.0)],
                    _ => vec![-STEP, STEP],
                };
                let place = |across| match relation {
                    Relation::LeftOf | Relation::RightOf => (towards, across),
                    Relation::Above | Relation::Below | Relation::And => (across, towards),
                };
                across.into_iter().map(place).collect()
            };
            let first = if matches!(relation, Relation::LeftOf | Relation::Above) { -STEP } else { STEP };
            vec![beside(prompt.first.count, first, &mut chance), beside(second.count, -first, &mut chance)]
        }
    };
    let lonely = prompt.second.is_none() && prompt.first.count == 1;
    let mut objects = Vec::new();
    for (group, places) in prompt.groups().zip(places) {
        let Group { colour, shape, .. } = group;
        let colour = colour.unwrap_or_else(|| Colour::ALL[chance.below(Colour::ALL.len())]);
        for (x, y) in places {
            let (jitter, size) = match lonely {
                true => (3.5, chance.between(7.0, 9.5)),
                false => (JITTER, chance.between(4.8, 5.6)),
            };
            let (x, y) = (x + chance.between(-jitter, jitter), y + chance.between(-jitter, jitter));
            objects.push(Object { shape, colour, x: middle + x, y: middle + y, size, turn: 0.0 });
        }
    }
    objects
}

/// Places of the shapes of the only group, from the middle of the picture.
fn alone(count: usize, chance: &mut Chance) -> Vec<(f64, f64)> {
    let turned = chance.below(2) == 1;
    match (count, turned) {
        (1, _) => vec![(0.0, 0.0)],
        (2, false) => vec![(-STEP, 0.0), (STEP, 0.0)],
        (2, true) => vec![(0.0, -STEP), (0.0, STEP)],
        (3, false) => vec![(-STEP, -STEP), (STEP, -STEP), (0.0, STEP)],
        (3, true) => vec![(0.0, -STEP), (-STEP, STEP), (STEP, STEP)],
        _ => vec![(-STEP, -STEP), (STEP, -STEP), (-STEP, STEP), (STEP, STEP)],
    }
}

/// Numbers that follow from a first one: SplitMix64.
pub(super) struct Chance(pub u64);

impl Chance {
    fn next(&mut self) -> u64 {
        let word = crate::data::glyphs::splitmix64(self.0);
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        word
    }

    /// Uniform in `low..high`.
    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One of `0..n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}
