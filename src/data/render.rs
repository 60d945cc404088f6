//! Draws the pictures of the embedded task.

use super::glyphs::GlyphPrompt;
use ab_glyph::{Font, FontRef, Glyph, PxScale, ScaleFont, point};
use std::sync::LazyLock;

/// Height of a picture in pixels.
pub const HEIGHT: usize = 24;
/// Width of a picture in pixels.
pub const WIDTH: usize = 48;
/// Font size in pixels an em: three digits fill the picture with room to move.
const EM: f32 = 19.0;
/// The widest a text may be, in pixels; a longer one is set smaller.
const MAX_WIDTH: f32 = 44.0;
/// Height of DejaVu's capitals and digits in ems, to centre them.
const CAP_HEIGHT: f32 = 0.729;

/// A typeface of the DejaVu family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Face {
    /// DejaVu Sans Bold.
    Sans,
    /// DejaVu Serif Bold.
    Serif,
    /// DejaVu Sans Mono Bold.
    Mono,
}

impl Face {
    /// All of them.
    pub const ALL: [Face; 3] = [Face::Sans, Face::Serif, Face::Mono];

    fn font(self) -> &'static FontRef<'static> {
        static FONTS: LazyLock<[FontRef<'static>; 3]> = LazyLock::new(|| {
            [dejavu::sans::bold(), dejavu::serif::bold(), dejavu::sans_mono::bold()]
                .map(|bytes| FontRef::try_from_slice(bytes).expect("the embedded DejaVu fonts are TrueType"))
        });
        &FONTS[self as usize]
    }
}

/// How a picture is drawn beyond what its prompt says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// The typeface.
    pub face: Face,
    /// Shift to the right of the centre in pixels, -1, 0 or 1.
    pub dx: i8,
    /// Shift down from the centre in pixels, -1, 0 or 1.
    pub dy: i8,
}

impl Style {
    /// How many different styles there are.
    pub const COUNT: u64 = 27;

    /// The style of a caller's (random) number: each of the [`Style::COUNT`] residues is another style.
    pub fn from_bits(bits: u64) -> Style {
        let shift = |digit: u64| (digit % 3) as i8 - 1;
        Style { face: Face::ALL[(bits % 3) as usize], dx: shift(bits / 3), dy: shift(bits / 9 % 3) }
    }
}

/// Draws a prompt: RGB `[3, HEIGHT, WIDTH]` in [0, 1], row-major, antialiased.
///
/// The same arguments give the same picture, bit for bit.
pub fn render(prompt: &GlyphPrompt, style: &Style) -> Vec<f32> {
    let coverage = coverage(&prompt.text, style); // [HEIGHT, WIDTH]
    let mut picture = Vec::with_capacity(3 * HEIGHT * WIDTH);
    for (ink, ground) in prompt.ink.rgb().into_iter().zip(prompt.ground.rgb()) {
        let (ink, ground) = (f32::from(ink) / 255.0, f32::from(ground) / 255.0);
        picture.extend(coverage.iter().map(|c| ground + c * (ink - ground)));
    }
    picture // [3, HEIGHT, WIDTH]
}

/// How much of each pixel the text covers, `[HEIGHT, WIDTH]` in [0, 1].
fn coverage(text: &str, style: &Style) -> Vec<f32> {
    let font = style.face.font();
    let (glyphs, width) = lay_out(text, font, EM);
    let em = EM * (MAX_WIDTH / width).min(1.0);
    let (glyphs, width) = if em < EM { lay_out(text, font, em) } else { (glyphs, width) };

    // Whole pixels: the strokes of every picture fall on the grid alike.
    let left = ((WIDTH as f32 - width) / 2.0).round() + f32::from(style.dx);
    let baseline = ((HEIGHT as f32 + CAP_HEIGHT * em) / 2.0).round() + f32::from(style.dy);
    let mut coverage = vec![0f32; HEIGHT * WIDTH];
    for mut glyph in glyphs {
        glyph.position += point(left, baseline);
        let Some(outline) = font.outline_glyph(glyph) else { continue };
        let corner = outline.px_bounds().min;
        outline.draw(|x, y, c| {
            let (x, y) = (corner.x as i64 + i64::from(x), corner.y as i64 + i64::from(y));
            if (0..WIDTH as i64).contains(&x) && (0..HEIGHT as i64).contains(&y) {
                let pixel = &mut coverage[y as usize * WIDTH + x as usize];
                *pixel = (*pixel + c).min(1.0);
            }
        });
    }
    coverage
}

/// The glyphs of a text on the baseline from x = 0, and where the next one would stand; `em` in pixels.
fn lay_out(text: &str, font: &'static FontRef<'static>, em: f32) -> (Vec<Glyph>, f32) {
    // ab_glyph counts a scale from ascender to descender, not in ems.
    let scale = PxScale::from(em * font.height_unscaled() / font.units_per_em().unwrap_or(2048.0));
    let scaled = font.as_scaled(scale);
    let mut x = 0.0;
    let mut glyphs = Vec::with_capacity(text.len());
    for c in text.chars() {
        let id = font.glyph_id(c);
        glyphs.push(id.with_scale_and_position(scale, point(x, 0.0)));
        x += scaled.h_advance(id);
    }
    (glyphs, x)
}
