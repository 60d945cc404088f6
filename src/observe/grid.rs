//! Pictures of pictures: a captioned grid of samples, and pairs of before and after.

use crate::error::{Error, Result};
use crate::fs;
use ab_glyph::{Font, FontRef, PxScale, ScaleFont, point};
use candle_core::{DType, Tensor};
use image::{ImageFormat, Rgb, RgbImage, imageops};
use std::io::Cursor;
use std::path::Path;

const PAPER: Rgb<u8> = Rgb([250, 250, 248]);
const LINE: Rgb<u8> = Rgb([222, 222, 218]);
const INK: Rgb<u8> = Rgb([45, 45, 42]);
const FAINT: Rgb<u8> = Rgb([120, 120, 114]);

/// Pixels around every tile.
const GAP: u32 = 8;
/// Caption text, in pixels.
const TEXT: f32 = 12.0;
/// From one line of text to the next, in pixels.
const LEADING: u32 = 15;
/// A caption longer than this many lines ends in an ellipsis.
const CAPTION_LINES: usize = 3;

/// Draws `images` `[N, 3, H, W]` (0..1, clamped) row by row with a caption below each.
///
/// Every pixel becomes a square of `scale` x `scale`. Captions wrap to the width of a tile; missing ones stay empty.
///
/// # Errors
/// The tensor is of another shape; [`Error::NotFinite`] for a pixel that is no number, which would be drawn black.
pub fn image_grid(images: &Tensor, captions: &[String], columns: usize, scale: u32) -> Result<RgbImage> {
    let cells = tiles(images, scale)?.into_iter().map(|tile| vec![tile]).collect::<Vec<_>>();
    draw(&cells, captions, columns, &[])
}

/// Draws pairs of `before` and `after` (both `[N, 3, H, W]`, 0..1) side by side, `columns` pairs to a row, under a header
/// row with "before" and `after_title` ("after update 60"). The caption of a pair runs below both.
pub fn before_after(
    before: &Tensor,
    after: &Tensor,
    captions: &[String],
    after_title: &str,
    columns: usize,
    scale: u32,
) -> Result<RgbImage> {
    if before.dims() != after.dims() {
        let (b, a) = (before.dims(), after.dims());
        return Err(Error::Failed(format!("pictures before {b:?} and after {a:?} are not of the same shape")));
    }
    let pairs = tiles(before, scale)?.into_iter().zip(tiles(after, scale)?).map(|(b, a)| vec![b, a]);
    draw(&pairs.collect::<Vec<_>>(), captions, columns, &["before", after_title])
}

/// Writes a PNG of the program's own; folders are made, and a reader never sees half a file.
pub fn save_png(picture: &RgbImage, path: &Path) -> Result<()> {
    fs::write(path, png(picture)?)
}

/// A picture as the bytes of a PNG.
pub fn png(picture: &RgbImage) -> Result<Vec<u8>> {
    let mut png = Cursor::new(Vec::new());
    let written = picture.write_to(&mut png, ImageFormat::Png);
    written.map_err(|e| Error::Failed(format!("a picture cannot be written as PNG: {e}")))?;
    Ok(png.into_inner())
}

/// `[N, 3, H, W]` -> N pictures of `H*scale` x `W*scale`.
fn tiles(images: &Tensor, scale: u32) -> Result<Vec<RgbImage>> {
    let (n, channels, height, width) = images.dims4()?;
    if channels != 3 {
        return Err(Error::Failed(format!("a grid wants pictures [N, 3, H, W], these are {:?}", images.dims())));
    }
    let values = images.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?; // [N * 3 * H * W]
    let (h, w, scale) = (height as u32, width as u32, scale.max(1));
    let plane = height * width;
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        let (image, value) = (at / (3 * plane), values[at]);
        return Err(Error::NotFinite(format!("image {image} has a pixel value of {value}; it cannot be drawn")));
    }
    Ok((0..n)
        .map(|i| {
            RgbImage::from_fn(w * scale, h * scale, |x, y| {
                let at = i * 3 * plane + (y / scale) as usize * width + (x / scale) as usize;
                // `as u8` saturates.
                Rgb([0, 1, 2].map(|c| (values[at + c * plane] * 255.0).round() as u8))
            })
        })
        .collect())
}

/// Lays out cells of one or two tiles of one size, their captions, and column headers.
fn draw(cells: &[Vec<RgbImage>], captions: &[String], columns: usize, headers: &[&str]) -> Result<RgbImage> {
    let text = Text::new()?;
    let Some(first) = cells.first() else { return Ok(RgbImage::from_pixel(2 * GAP, 2 * GAP, PAPER)) };
    let (tile_w, tile_h) = (first[0].width(), first[0].height());
    let inner = first.len() as u32 * (tile_w + GAP) - GAP;
    let columns = columns.clamp(1, cells.len());

    let wrapped: Vec<_> = (0..cells.len()).map(|i| text.wrap(captions.get(i).map_or("", |c| c), inner)).collect();
    let lines = wrapped.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let cell_w = inner + 2 * GAP;
    let cell_h = tile_h + 2 * GAP + if lines > 0 { lines * LEADING + GAP / 2 } else { 0 };
    let top = if headers.is_empty() { 0 } else { LEADING + GAP };
    let rows = cells.len().div_ceil(columns) as u32;
    let mut page = RgbImage::from_pixel(columns as u32 * cell_w, top + rows * cell_h, PAPER);

    for column in 0..columns as u32 {
        for (k, header) in headers.iter().enumerate() {
            let x = column * cell_w + GAP + k as u32 * (tile_w + GAP);
            let shown = text.wrap(header, tile_w).into_iter().next().unwrap_or_default();
            text.draw(&mut page, &shown, x, GAP, FAINT);
        }
    }
    for (i, (cell, caption)) in cells.iter().zip(&wrapped).enumerate() {
        let (x, y) = ((i % columns) as u32 * cell_w, top + (i / columns) as u32 * cell_h);
        for (k, tile) in cell.iter().enumerate() {
            let left = x + GAP + k as u32 * (tile_w + GAP);
            imageops::replace(&mut page, tile, left.into(), (y + GAP).into());
        }
        for (n, line) in caption.iter().enumerate() {
            text.draw(&mut page, line, x + GAP, y + GAP + tile_h + GAP / 2 + n as u32 * LEADING, INK);
        }
    }
    separate(&mut page, cell_w, cell_h, top);
    Ok(page)
}

/// Thin lines between the cells.
fn separate(page: &mut RgbImage, cell_w: u32, cell_h: u32, top: u32) {
    for (x, y, pixel) in page.enumerate_pixels_mut() {
        let row_edge = y >= top && (y - top).is_multiple_of(cell_h) && y > 0;
        if row_edge || (x > 0 && x.is_multiple_of(cell_w)) {
            *pixel = LINE;
        }
    }
}

/// The embedded font at caption size.
struct Text {
    font: FontRef<'static>,
}

impl Text {
    fn new() -> Result<Self> {
        let font = FontRef::try_from_slice(dejavu::sans::regular())
            .map_err(|e| Error::Failed(format!("the embedded font cannot be read: {e}")))?;
        Ok(Self { font })
    }

    /// Width in pixels.
    fn width(&self, text: &str) -> f32 {
        let font = self.font.as_scaled(PxScale::from(TEXT));
        text.chars().map(|c| font.h_advance(font.glyph_id(c))).sum()
    }

    /// Breaks at spaces, and inside words that are too long, into at most [`CAPTION_LINES`] lines of `width` pixels.
    fn wrap(&self, text: &str, width: u32) -> Vec<String> {
        let fits = |line: &str| self.width(line) <= width as f32;
        let mut lines: Vec<String> = Vec::new();
        for word in text.split_whitespace() {
            match lines.last_mut() {
                Some(line) if fits(&format!("{line} {word}")) => *line = format!("{line} {word}"),
                _ => lines.push(String::new()),
            }
            // A new line was begun for this word.
            if lines.last().is_some_and(String::is_empty) {
                for c in word.chars() {
                    if lines.last().is_some_and(|line| !line.is_empty() && !fits(&format!("{line}{c}"))) {
                        lines.push(String::new());
                    }
                    lines.last_mut().into_iter().for_each(|line| line.push(c));
                }
            }
        }
        if lines.len() > CAPTION_LINES {
            lines.truncate(CAPTION_LINES);
            let last = &mut lines[CAPTION_LINES - 1];
            while !last.is_empty() && !fits(&format!("{last}…")) {
                last.pop();
            }
            last.push('…');
        }
        lines
    }

    /// Draws one line whose top left corner is (`left`, `top`).
    fn draw(&self, page: &mut RgbImage, text: &str, left: u32, top: u32, colour: Rgb<u8>) {
        let font = self.font.as_scaled(PxScale::from(TEXT));
        let mut x = left as f32;
        for c in text.chars() {
            let id = font.glyph_id(c);
            let glyph = id.with_scale_and_position(TEXT, point(x, top as f32 + font.ascent()));
            x += font.h_advance(id);
            let Some(outline) = self.font.outline_glyph(glyph) else { continue };
            let corner = outline.px_bounds().min;
            outline.draw(|dx, dy, coverage| {
                let (px, py) = (corner.x + dx as f32, corner.y + dy as f32);
                if px >= 0.0
                    && py >= 0.0
                    && let Some(pixel) = page.get_pixel_mut_checked(px as u32, py as u32)
                {
                    for (old, new) in pixel.0.iter_mut().zip(colour.0) {
                        *old = (f32::from(*old) * (1.0 - coverage) + f32::from(new) * coverage).round() as u8;
                    }
                }
            });
        }
    }
}
