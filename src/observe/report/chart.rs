//! Charts as SVG. Colours are CSS classes, so that the page around them decides about light and dark.

use super::run::Points;
use super::{escape, short};
use std::fmt::Write;

/// No line has more points than this; longer ones are averaged.
const MOST_POINTS: usize = 500;
/// No bar chart has more columns than this.
const MOST_COLUMNS: usize = 90;
/// From this many points on a line is also drawn smoothed.
const SMOOTH_FROM: usize = 24;

/// A chart's place on the page, in SVG units (CSS pixels at full width).
#[derive(Clone, Copy)]
pub struct Size {
    /// With the labels of the vertical axis.
    pub width: f64,
    /// With the labels of the horizontal axis.
    pub height: f64,
}

/// Over the whole page.
pub const WIDE: Size = Size { width: 1056.0, height: 300.0 };
/// One of three in a row.
pub const SMALL: Size = Size { width: 330.0, height: 190.0 };

/// From a chart's left edge to its vertical axis.
pub const LEFT: f64 = 52.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 26.0;

/// One curve.
pub struct Line<'a> {
    /// For the legend and the hover text.
    pub label: &'a str,
    /// Colour class.
    pub class: &'a str,
    /// Update and value; a NaN is a gap.
    pub points: Points,
    /// Few points that each matter (evaluations): a dot on each, never smoothed.
    pub dots: bool,
}

/// The space between two curves.
pub struct Band<'a> {
    /// Colour class.
    pub class: &'a str,
    /// Where, the lower and the upper edge; all finite.
    pub edges: Vec<(f64, f64, f64)>,
}

/// Where something changed.
pub struct Mark {
    /// The update.
    pub at: f64,
    /// For the hover text.
    pub label: String,
}

/// Maps data to SVG units.
struct Frame {
    size: Size,
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    fn at_x(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (self.size.width - LEFT - RIGHT)
    }

    fn at_y(&self, y: f64) -> f64 {
        self.size.height - BOTTOM - (y - self.y.0) / (self.y.1 - self.y.0) * (self.size.height - TOP - BOTTOM)
    }

    /// The grid lines and the labels of both axes.
    fn axes(&self) -> String {
        let Size { width, height } = self.size;
        let mut svg = String::new();
        for tick in ticks(self.y, if height > 250.0 { 6 } else { 5 }) {
            let (y, right) = (self.at_y(tick), width - RIGHT);
            write!(svg, "<path class=\"rule\" d=\"M{LEFT} {y:.1}H{right}\"/>").ok();
            write!(svg, "<text x=\"{}\" y=\"{:.1}\" class=\"ylabel\">{}</text>", LEFT - 8.0, y + 4.0, short(tick)).ok();
        }
        for tick in ticks(self.x, if width > 600.0 { 10 } else { 5 }).into_iter().filter(|tick| tick.fract() == 0.0) {
            let x = self.at_x(tick);
            write!(svg, "<text x=\"{x:.1}\" y=\"{:.1}\" class=\"xlabel\">{}</text>", height - 7.0, short(tick)).ok();
        }
        svg
    }
}

/// An SVG element around `inner`; `label` is for who cannot see it.
fn element(size: Size, label: &str, inner: &str) -> String {
    let Size { width, height } = size;
    format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">{inner}</svg>", escape(label))
}

/// Curves over the updates; empty if there is no finite point.
pub fn lines(lines: &[Line], marks: &[Mark], size: Size) -> String {
    let inner = panel(lines, &[], marks, size, "update");
    if inner.is_empty() {
        return inner;
    }
    let labels: Vec<_> = lines.iter().map(|line| line.label).collect();
    element(size, &format!("{} over updates", labels.join(", ")), &inner)
}

/// Curves above bands, to stand inside an SVG element; empty if there is no finite point. `over` is for the hover text.
pub fn panel(lines: &[Line], bands: &[Band], marks: &[Mark], size: Size, over: &str) -> String {
    let edges = bands.iter().flat_map(|band| &band.edges).flat_map(|&(x, low, high)| [(x, low), (x, high)]);
    let points = lines.iter().flat_map(|line| line.points.iter().copied());
    let Some(frame) = frame(points.filter(|(_, y)| y.is_finite()).chain(edges), size) else { return String::new() };
    let mut svg = frame.axes();
    for Mark { at, label } in marks {
        let (x, bottom) = (frame.at_x(*at), size.height - BOTTOM);
        write!(svg, "<path class=\"mark\" d=\"M{x:.1} {TOP}V{bottom}\"><title>{}</title></path>", escape(label)).ok();
    }
    for Band { class, edges } in bands {
        let upper: Points = edges.iter().map(|&(x, _, high)| (x, high)).collect();
        let lower: Points = edges.iter().rev().map(|&(x, low, _)| (x, low)).collect();
        let outline = path(&frame, &[upper, lower].concat());
        write!(svg, "<path class=\"band {class}\" d=\"{outline}Z\"/>").ok();
    }
    for Line { class, points, dots, .. } in lines {
        let points = binned(points);
        let smooth = !dots && points.len() >= SMOOTH_FROM;
        let raw = if smooth { "raw " } else { "" };
        write!(svg, "<path class=\"line {raw}{class}\" d=\"{}\"/>", path(&frame, &points)).ok();
        if smooth {
            write!(svg, "<path class=\"line {class}\" d=\"{}\"/>", path(&frame, &smoothed(&points))).ok();
        }
    }
    // Many dots are smaller: the lines between them stay in sight.
    let most = lines.iter().filter(|line| line.dots).map(|line| binned(&line.points).len()).max().unwrap_or(0);
    let dot = ((size.width - LEFT - RIGHT) / most as f64 / 6.0).clamp(2.0, 4.0);
    // Dots last: above all lines, and the hover text belongs to them.
    for Line { label, class, points, dots } in lines {
        let radius = if *dots { dot } else { 7.0 };
        let class = if *dots { format!("dot {class}") } else { "hover".into() };
        for (x, y) in binned(points).into_iter().filter(|(_, y)| y.is_finite()) {
            let (cx, cy) = (frame.at_x(x), frame.at_y(y));
            write!(svg, "<circle class=\"{class}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"{radius:.1}\">").ok();
            write!(svg, "<title>{}: {} ({over} {})</title></circle>", escape(label), short(y), x.round()).ok();
        }
    }
    svg
}

/// Columns of stacked parts over the updates, long runs averaged into fewer columns; empty if there is nothing.
///
/// `parts` are label, colour class and points; all of the same updates. Values that are not finite count as none.
pub fn stack(parts: &[Line], size: Size) -> String {
    let count = parts.iter().map(|part| part.points.len()).max().unwrap_or(0);
    let per_column = count.div_ceil(MOST_COLUMNS).max(1);
    // Per column: the first and last update, and the mean of every part.
    let columns: Vec<(f64, f64, Vec<f64>)> = (0..count.div_ceil(per_column))
        .filter_map(|column| {
            let slice = |part: &'_ Line| -> Points {
                part.points.iter().skip(column * per_column).take(per_column).copied().collect()
            };
            let updates = parts.iter().map(slice).find(|points| !points.is_empty())?;
            let means = parts.iter().map(|part| {
                let points = slice(part);
                points.iter().map(|(_, y)| y.max(0.0)).sum::<f64>() / points.len().max(1) as f64
            });
            Some((updates.first()?.0, updates.last()?.0, means.collect()))
        })
        .collect();
    let top = columns.iter().map(|(_, _, means)| means.iter().sum::<f64>()).fold(0.0, f64::max);
    let (Some(first), Some(last)) = (columns.first(), columns.last()) else { return String::new() };
    if top <= 0.0 {
        return String::new();
    }

    let frame = Frame { size, x: (first.0 - 0.5, last.1 + 0.5), y: (0.0, top * 1.04) };
    let mut svg = frame.axes();
    let full = (frame.at_x(last.1) - LEFT + 1.0) / columns.len() as f64;
    let gap = if full > 6.0 { 2.0 } else { 0.5 };
    for (from, to, means) in &columns {
        let left = frame.at_x(from - 0.5);
        let width = (frame.at_x(to + 0.5) - left - gap).clamp(0.5, 28.0);
        let left = (frame.at_x(from - 0.5) + frame.at_x(to + 0.5) - width) / 2.0;
        let mut below = 0.0;
        for (part, mean) in parts.iter().zip(means).filter(|(_, mean)| **mean > 0.0) {
            let (y, bottom) = (frame.at_y(below + mean), frame.at_y(below));
            below += mean;
            write!(svg, "<rect class=\"{}\" x=\"{left:.1}\" y=\"{y:.2}\" ", part.class).ok();
            write!(svg, "width=\"{width:.1}\" height=\"{:.2}\">", bottom - y).ok();
            let which = if from == to { format!("update {from}") } else { format!("updates {from} to {to}") };
            write!(svg, "<title>{}: {} s ({which})</title></rect>", escape(part.label), short(*mean)).ok();
        }
    }
    element(size, "seconds of every phase over updates", &svg)
}

/// Axes that hold all points with a little room above and below.
fn frame(points: impl Iterator<Item = (f64, f64)>, size: Size) -> Option<Frame> {
    let points: Points = points.collect();
    let range = |values: Vec<f64>| {
        let low = values.iter().copied().reduce(f64::min)?;
        let high = values.iter().copied().reduce(f64::max)?;
        Some((low, high))
    };
    let (x0, x1) = range(points.iter().map(|p| p.0).collect())?;
    let (y0, y1) = range(points.iter().map(|p| p.1).collect())?;
    let room = if y1 > y0 { (y1 - y0) * 0.06 } else { y1.abs().max(1.0) * 0.5 };
    // What is never negative gets no axis below zero.
    let bottom = if y0 >= 0.0 { (y0 - room).max(0.0) } else { y0 - room };
    Some(Frame { size, x: (x0, if x1 > x0 { x1 } else { x0 + 1.0 }), y: (bottom, y1 + room) })
}

/// About `count` round numbers within a range.
fn ticks((low, high): (f64, f64), count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    if !rough.is_finite() || rough <= 0.0 {
        return Vec::new();
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let first = (low / step).ceil();
    (0..=2 * count).map(|i| (first + i as f64) * step).take_while(|tick| *tick <= high).collect()
}

/// Averages neighbours until at most [`MOST_POINTS`] are left.
fn binned(points: &Points) -> Points {
    let size = points.len().div_ceil(MOST_POINTS).max(1);
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    points
        .chunks(size)
        .map(|bin| {
            let finite: Vec<f64> = bin.iter().map(|p| p.1).filter(|y| y.is_finite()).collect();
            (mean(&bin.iter().map(|p| p.0).collect::<Vec<_>>()), mean(&finite))
        })
        .collect()
}

/// Centred moving average over about a twelfth of the line.
fn smoothed(points: &Points) -> Points {
    let reach = (points.len() / 24).max(1);
    (0..points.len())
        .map(|i| {
            let near = &points[i.saturating_sub(reach)..=(i + reach).min(points.len() - 1)];
            let near = near.iter().map(|p| p.1).filter(|y| y.is_finite());
            let (sum, n) = near.fold((0.0, 0.0), |(sum, n), y| (sum + y, n + 1.0));
            (points[i].0, sum / n)
        })
        .collect()
}

/// The `d` of a path through the points, broken at gaps.
fn path(frame: &Frame, points: &Points) -> String {
    let mut d = String::new();
    let mut pen_down = false;
    for (x, y) in points {
        if y.is_finite() {
            let command = if pen_down { 'L' } else { 'M' };
            write!(d, "{command}{:.1} {:.1}", frame.at_x(*x), frame.at_y(*y)).ok();
        }
        pen_down = y.is_finite();
    }
    d
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks((0.0, 1.0), 5), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks((1.0, 60.0), 5), [20.0, 40.0, 60.0]);
        assert!(ticks((1.0, 1.0), 5).is_empty());
    }

    #[test]
    fn lines_break_at_gaps() {
        let points = vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0)];
        let svg = lines(&[Line { label: "<loss>", class: "s1", points, dots: false }], &[], SMALL);
        assert!(svg.contains("&lt;loss&gt;") && !svg.contains("NaN"), "{svg}");
        let gap = svg.split("d=\"").find(|d| d.starts_with("M52.0")).unwrap();
        assert_eq!(gap.split('"').next().unwrap().matches('M').count(), 2);
        assert_eq!(lines(&[], &[], SMALL), "");
    }

    #[test]
    fn a_long_line_is_averaged() {
        let points: Points = (0..5000).map(|i| (f64::from(i), 2.0)).collect();
        let short = binned(&points);
        assert_eq!((short.len(), short[0]), (500, (4.5, 2.0)));
        assert!(smoothed(&short).iter().all(|p| p.1 == 2.0));
    }
}
