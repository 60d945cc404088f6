//! The embedded task: a short text in one of six inks on one of four grounds, `"417" in red on yellow`.
//!
//! The prompts are all numbers of three (or, harder, four) digits in every readable colour pair; 200 of the numbers are
//! held out for evaluation. Other short texts parse and render too, they are only not in the built-in sets.

use crate::error::{Error, Result};
use std::{fmt, sync::LazyLock};

/// The longest text a prompt may ask for, in characters: five still fit on the picture.
pub const MAX_TEXT: usize = 5;
/// How many of the numbers of a length are held out for evaluation.
pub const HELD_OUT: usize = 200;
/// The least contrast ratio of ink to ground (WCAG 2.2, success criterion 1.4.11: 3 to 1).
pub const MIN_CONTRAST: f64 = 3.0;
/// What a glyph can be drawn in.
pub const INKS: [Colour; 6] = [Colour::Black, Colour::White, Colour::Red, Colour::Green, Colour::Blue, Colour::Purple];
/// What it can be drawn on.
pub const GROUNDS: [Colour; 4] = [Colour::White, Colour::Yellow, Colour::Sky, Colour::Black];

/// A colour of the palette.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Colour {
    /// Ink and ground.
    Black,
    /// Ink and ground.
    White,
    /// Ink only.
    Red,
    /// Ink only.
    Green,
    /// Ink only.
    Blue,
    /// Ink only.
    Purple,
    /// Ground only.
    Yellow,
    /// Ground only.
    Sky,
}

impl Colour {
    /// The word for it in a prompt.
    pub fn name(self) -> &'static str {
        match self {
            Colour::Black => "black",
            Colour::White => "white",
            Colour::Red => "red",
            Colour::Green => "green",
            Colour::Blue => "blue",
            Colour::Purple => "purple",
            Colour::Yellow => "yellow",
            Colour::Sky => "sky",
        }
    }

    /// Its sRGB value.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Colour::Black => [0, 0, 0],
            Colour::White => [255, 255, 255],
            Colour::Red => [204, 26, 26],
            Colour::Green => [0, 115, 38],
            Colour::Blue => [26, 51, 217],
            Colour::Purple => [128, 26, 153],
            Colour::Yellow => [255, 224, 51],
            Colour::Sky => [166, 222, 255],
        }
    }

    /// Relative luminance in [0, 1] (WCAG 2.2).
    fn luminance(self) -> f64 {
        let linear = self.rgb().map(|value| {
            let s = f64::from(value) / 255.0;
            if s <= 0.04045 { s / 12.92 } else { libm::pow((s + 0.055) / 1.055, 2.4) }
        });
        0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    }
}

impl fmt::Display for Colour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Contrast ratio of two colours, 1 (the same) to 21 (black and white), as WCAG 2.2 defines it.
pub fn contrast(a: Colour, b: Colour) -> f64 {
    let (a, b) = (a.luminance(), b.luminance());
    (a.max(b) + 0.05) / (a.min(b) + 0.05)
}

/// The readable (ink, ground) pairs, ground by ground, in the palette's order.
pub fn colour_pairs() -> impl Iterator<Item = (Colour, Colour)> + Clone {
    GROUNDS.into_iter().flat_map(|ground| inks_on(ground).map(move |ink| (ink, ground)))
}

fn inks_on(ground: Colour) -> impl Iterator<Item = Colour> + Clone {
    INKS.into_iter().filter(move |&ink| contrast(ink, ground) >= MIN_CONTRAST)
}

/// What a prompt of the task asks for. [`Display`](fmt::Display) gives the prompt back.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GlyphPrompt {
    /// One to [`MAX_TEXT`] ASCII letters or digits.
    pub text: String,
    /// The colour of the text, one of [`INKS`].
    pub ink: Colour,
    /// The colour behind it, one of [`GROUNDS`].
    pub ground: Colour,
}

impl GlyphPrompt {
    /// Reads `"TEXT" in INK on GROUND`.
    ///
    /// # Errors
    /// [`Error::Usage`] where the form, the text, a colour or the pair of colours is not of the task.
    pub fn parse(prompt: &str) -> Result<GlyphPrompt> {
        let form = || Error::Usage(format!("prompt {prompt:?}: not of the form {:?}", "\"417\" in red on yellow"));
        let rest = prompt.trim().strip_prefix('"').ok_or_else(form)?;
        let (text, rest) = rest.split_once('"').ok_or_else(form)?;
        let words: Vec<&str> = rest.split_whitespace().collect();
        let &["in", ink, "on", ground] = words.as_slice() else { return Err(form()) };

        if text.is_empty() || text.len() > MAX_TEXT || !text.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            let message = format!("prompt {prompt:?}: text {text:?} must be 1 to {MAX_TEXT} ASCII letters or digits");
            return Err(Error::Usage(message));
        }
        let ink = named(&INKS, ink).ok_or_else(|| unknown(prompt, "ink", ink, &INKS))?;
        let ground = named(&GROUNDS, ground).ok_or_else(|| unknown(prompt, "ground", ground, &GROUNDS))?;
        if contrast(ink, ground) < MIN_CONTRAST {
            let readable = list(inks_on(ground));
            let message = format!("prompt {prompt:?}: {ink} on {ground} is hard to read; on {ground} use {readable}");
            return Err(Error::Usage(message));
        }
        Ok(GlyphPrompt { text: text.to_string(), ink, ground })
    }
}

impl fmt::Display for GlyphPrompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\" in {} on {}", self.text, self.ink, self.ground)
    }
}

fn named(palette: &[Colour], name: &str) -> Option<Colour> {
    palette.iter().copied().find(|colour| colour.name() == name)
}

fn unknown(prompt: &str, what: &str, value: &str, palette: &[Colour]) -> Error {
    Error::Usage(format!("prompt {prompt:?}: unknown {what} {value:?}; use {}", list(palette.iter().copied())))
}

fn list(colours: impl Iterator<Item = Colour>) -> String {
    colours.map(Colour::name).collect::<Vec<_>>().join(", ")
}

/// How long the numbers of a prompt set are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digits {
    /// `000` to `999`: what the embedded base model was trained on.
    Three,
    /// `0000` to `9999`: a harder task, for runs whose prompts change on the way (`configs/glyphs/stages.toml`).
    Four,
}

impl Digits {
    const ALL: [Digits; 2] = [Digits::Three, Digits::Four];

    fn count(self) -> usize {
        match self {
            Digits::Three => 3,
            Digits::Four => 4,
        }
    }

    /// How many different numbers there are.
    pub fn numbers(self) -> usize {
        10usize.pow(self.count() as u32)
    }

    /// Whether each number is never trained on: those with the [`HELD_OUT`] smallest hashes.
    fn held_out(self) -> &'static [bool] {
        static HELD: LazyLock<[Vec<bool>; 2]> = LazyLock::new(|| {
            Digits::ALL.map(|digits| {
                let mut numbers: Vec<usize> = (0..digits.numbers()).collect();
                numbers.sort_by_key(|&number| splitmix64(number as u64));
                let mut held_out = vec![false; digits.numbers()];
                numbers[..HELD_OUT].iter().for_each(|&number| held_out[number] = true);
                held_out
            })
        });
        &HELD[self as usize]
    }

    /// The numbers that are, or are not, held out, in increasing order.
    fn texts(self, held_out: bool) -> impl Iterator<Item = String> {
        let width = self.count();
        let chosen = (0..self.numbers()).filter(move |&number| self.held_out()[number] == held_out);
        chosen.map(move |number| format!("{number:0width$}"))
    }
}

/// The output function of SplitMix64 (Steele, Lea and Flood 2014) for the state `x`.
pub(super) fn splitmix64(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Whether `text` is one of the 200 numbers of its length that training never shows. Other texts are not.
pub fn is_held_out(text: &str) -> bool {
    let digits = Digits::ALL.into_iter().find(|digits| digits.count() == text.len());
    let number = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<usize>().ok()).flatten();
    matches!((digits, number), (Some(digits), Some(number)) if digits.held_out()[number])
}

/// The training prompts: number by number, each in every colour pair.
pub fn train_prompts(digits: Digits) -> impl Iterator<Item = GlyphPrompt> {
    digits
        .texts(false)
        .flat_map(|text| colour_pairs().map(move |(ink, ground)| GlyphPrompt { text: text.clone(), ink, ground }))
}

/// The evaluation prompts: every held-out number once, the colour pairs dealt out in turn.
pub fn eval_prompts(digits: Digits) -> impl Iterator<Item = GlyphPrompt> {
    digits.texts(true).zip(colour_pairs().cycle()).map(|(text, (ink, ground))| GlyphPrompt { text, ink, ground })
}
