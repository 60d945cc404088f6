//! What shapes a picture shows, by rules on its pixels.
//!
//! A pixel is taken for a mixture of the ground and one colour of the palette, and belongs to an object if the colour's
//! share is at least one half. Connected pixels of one colour are an object; its shape follows from moments that do not change
//! when it is moved, turned or enlarged.

use crate::data::shapes::{Colour, GROUND, Shape};
use image::RgbImage;

/// Smaller than this share of the picture nothing is seen.
const SPECK: f64 = 6.0 / 1024.0;
/// Smaller than this share it has no shape.
const LEAST: f64 = 22.0 / 1024.0;

/// Something that the picture shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// What it is; nothing: no shape of the task.
    pub shape: Option<Shape>,
    /// Its colour, the palette's nearest.
    pub colour: Colour,
    /// Its pixels.
    pub area: usize,
    /// The mean of its pixels, as a share of the picture's width and height.
    pub place: (f64, f64),
}

/// The objects of a picture, row by row of their first pixels.
pub fn objects(picture: &RgbImage) -> Vec<Seen> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let mut colours: Vec<Option<Colour>> = picture.pixels().map(|pixel| colour(pixel.0)).collect(); // [H, W]
    let pixels = (width * height) as f64;
    let mut seen = Vec::new();
    for start in 0..colours.len() {
        let Some(colour) = colours[start] else { continue };
        let component = take_component(&mut colours, width, start, colour);
        let area = component.len() as f64;
        if area >= SPECK * pixels {
            let moments = Moments::of(&component);
            let (x, y) = moments.centre;
            seen.push(Seen {
                shape: if area >= LEAST * pixels { moments.shape() } else { None },
                colour,
                area: component.len(),
                place: ((x + 0.5) / width as f64, (y + 0.5) / height as f64),
            });
        }
    }
    seen
}

/// The colour of which a pixel has a share of at least one half, the rest being ground.
fn colour(pixel: [u8; 3]) -> Option<Colour> {
    let minus_ground = |rgb: [u8; 3]| [0, 1, 2].map(|c| f64::from(rgb[c]) - f64::from(GROUND[c]));
    let pixel = minus_ground(pixel);
    let dot = |a: [f64; 3], b: [f64; 3]| a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
    let mixture = |colour: Colour| {
        let full = minus_ground(colour.rgb());
        let share = dot(pixel, full) / dot(full, full);
        let rest = [0, 1, 2].map(|c| pixel[c] - share * full[c]);
        (colour, share, dot(rest, rest))
    };
    let mixtures = Colour::ALL.map(mixture);
    let (colour, share, _) = mixtures.into_iter().min_by(|a, b| a.2.total_cmp(&b.2))?;
    (share >= 0.5).then_some(colour)
}

/// Takes the pixels (x, y) of `colour` that hang together, side by side, with the one at `start`.
fn take_component(colours: &mut [Option<Colour>], width: usize, start: usize, colour: Colour) -> Vec<(usize, usize)> {
    colours[start] = None;
    let mut component = vec![(start % width, start / width)];
    let mut next = 0;
    while let Some(&(x, y)) = component.get(next) {
        next += 1;
        for (x, y) in [(x.wrapping_sub(1), y), (x + 1, y), (x, y.wrapping_sub(1)), (x, y + 1)] {
            let at = y.wrapping_mul(width).wrapping_add(x);
            if x < width && colours.get(at).is_some_and(|found| *found == Some(colour)) {
                colours[at] = None;
                component.push((x, y));
            }
        }
    }
    component
}

/// Moments of a component about its centre, z = x + iy being a pixel: numbers that moving, turning and enlarging leave alone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moments {
    /// Mean of the pixels.
    centre: (f64, f64),
    /// 2 pi E|z|^2 / area: 1 for a disc, 1.047 for a square, 1.209 for an equilateral triangle, more for what is in pieces,
    /// long or hollow.
    pub spread: f64,
    /// |E z^2| / E|z|^2: 0 for all three, more for what is longer than wide.
    pub second: f64,
    /// |E z^3| / (E|z|^2)^(3/2): 0.8 for an equilateral triangle, 0 for the others.
    pub third: f64,
    /// |E z^4| / (E|z|^2)^2: 0.6 for a square, 0 for the others.
    pub fourth: f64,
}

impl Moments {
    fn of(component: &[(usize, usize)]) -> Self {
        let area = component.len() as f64;
        let mean =
            |f: &dyn Fn(f64, f64) -> f64| component.iter().map(|&(x, y)| f(x as f64, y as f64)).sum::<f64>() / area;
        let centre = (mean(&|x, _| x), mean(&|_, y| y));
        let (mut second, mut third, mut fourth) = ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0));
        let mut square = area / 6.0; // of the pixels themselves, which are squares of side 1
        for &(x, y) in component {
            let z = (x as f64 - centre.0, y as f64 - centre.1);
            let z2 = times(z, z);
            square += z.0 * z.0 + z.1 * z.1;
            add(&mut second, z2);
            add(&mut third, times(z2, z));
            add(&mut fourth, times(z2, z2));
        }
        let square = square / area;
        let size = |(re, im): (f64, f64)| re.hypot(im) / area;
        Self {
            centre,
            spread: std::f64::consts::TAU * square / area,
            second: size(second) / square,
            third: size(third) / (square * square.sqrt()),
            fourth: size(fourth) / (square * square),
        }
    }

    /// The shape whose numbers these are, within bounds.
    fn shape(&self) -> Option<Shape> {
        let near = |shape: &Shape| {
            let (spread, third, fourth) = numbers(*shape);
            (self.spread - spread).abs() < 0.12
                && self.second < 0.25
                && (self.third - third).abs() < 0.35
                && (self.fourth - fourth).abs() < 0.3
        };
        Shape::ALL.into_iter().find(near)
    }
}

/// Spread, third and fourth moment of an ideal shape.
fn numbers(shape: Shape) -> (f64, f64, f64) {
    match shape {
        Shape::Circle => (1.0, 0.0, 0.0),
        Shape::Square => (std::f64::consts::PI / 3.0, 0.0, 0.6),
        Shape::Triangle => (std::f64::consts::TAU / (3.0 * 3f64.sqrt()), 0.8, 0.0),
    }
}

fn times(a: (f64, f64), b: (f64, f64)) -> (f64, f64) {
    (a.0 * b.0 - a.1 * b.1, a.0 * b.1 + a.1 * b.0)
}

fn add(sum: &mut (f64, f64), z: (f64, f64)) {
    *sum = (sum.0 + z.0, sum.1 + z.1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::shapes::{Object, SIDE, draw};

    fn moments(object: Object) -> Moments {
        let values = draw(&[object]);
        let picture = RgbImage::from_fn(SIDE as u32, SIDE as u32, |x, y| {
            let at = y as usize * SIDE + x as usize;
            image::Rgb([0, 1, 2].map(|c| (values[c * SIDE * SIDE + at] * 255.0).round() as u8))
        });
        let mut colours: Vec<_> = picture.pixels().map(|pixel| colour(pixel.0)).collect();
        let start = colours.iter().position(Option::is_some).unwrap();
        Moments::of(&take_component(&mut colours, SIDE, start, object.colour))
    }

    /// The ideal numbers are those of integrals over the shapes; sizes and turns that renders and samples have.
    #[test]
    fn moments_of_drawn_shapes_are_near_those_of_ideal_ones_however_they_are_turned() {
        for shape in Shape::ALL {
            let (spread, third, fourth) = numbers(shape);
            for step in 0..200 {
                let part = |n: usize| (step * n % 200) as f64 / 200.0;
                let (x, y) = (15.5 + part(7), 15.5 + part(11));
                let object =
                    Object { shape, colour: Colour::Red, x, y, size: 4.8 + 4.0 * part(13), turn: 3.2 * part(17) };
                let found = moments(object);
                // Clear of the bounds within which a shape is known.
                let off = [found.spread - spread, found.second, found.third - third, found.fourth - fourth];
                let near = off.iter().zip([0.1, 0.2, 0.2, 0.25]).all(|(off, most)| off.abs() < most);
                assert!(near && found.shape() == Some(shape), "{object:?} {found:?}");
            }
        }
    }
}
