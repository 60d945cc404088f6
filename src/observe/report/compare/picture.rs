//! The comparison as one SVG file that needs no page around it: three panels and a legend.

use super::method::{Method, Point};
use crate::observe::report::chart::{self, Band, LEFT, Line, Size};
use crate::observe::report::escape;
use std::fmt::Write;

/// Six colours that people with any colour vision tell apart on white (Okabe and Ito); a seventh method and its
/// followers have them again, dashed and with hollow dots.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
/// More would look alike.
pub const MOST_METHODS: usize = 2 * COLOURS.len();

const PANEL: Size = Size { width: 400.0, height: 300.0 };
const MARGIN: f64 = 16.0;
const WIDTH: f64 = 3.0 * PANEL.width + 2.0 * MARGIN;
/// Where the legend begins: below the title.
const LEGEND: f64 = 46.0;
const ROW: f64 = 22.0;

/// What an axis counts, in the picture and in the hover text, and its values.
type Axis = (&'static str, &'static str, fn(&Point) -> f64);
const AXES: [Axis; 3] = [
    ("updates", "update", |point| point.update),
    ("images sampled", "images", |point| point.images),
    ("training seconds", "seconds", |point| point.seconds),
];

/// The whole file.
pub fn render(methods: &[Method], reward: &str) -> String {
    let classes: Vec<String> = (1..=methods.len()).map(|number| format!("m{number}")).collect();
    let (legend, top) = legend(methods, &classes);
    let height = top + PANEL.height + 34.0;
    let title = format!("Held-out {} reward", escape(reward));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\" aria-label=\"{title} of every method over updates, images and seconds\">\n<style>{}</style>\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" rx=\"8\" fill=\"#fff\"/>\n\
         <text x=\"{MARGIN}\" y=\"28\" class=\"title\">{title}</text>\n\
         <text x=\"{}\" y=\"28\" class=\"ylabel\">line: mean over the seeds; band: smallest to largest</text>\n\
         {legend}\n",
        style(methods.len()),
        WIDTH - MARGIN
    );
    for (i, (title, over, x)) in AXES.into_iter().enumerate() {
        let left = MARGIN + i as f64 * PANEL.width;
        let middle = (LEFT + PANEL.width) / 2.0;
        let panel = panel(methods, &classes, over, x);
        let name = format!("<text x=\"{middle}\" y=\"{}\" class=\"axis\">{title}</text>", PANEL.height + 14.0);
        writeln!(svg, "<g transform=\"translate({left} {top})\">{panel}{name}</g>").ok();
    }
    svg + "</svg>\n"
}

/// Every method's curve, and the band between its seeds if there are several.
fn panel(methods: &[Method], classes: &[String], over: &str, x: fn(&Point) -> f64) -> String {
    let methods = || methods.iter().zip(classes);
    let lines: Vec<Line> = methods()
        .map(|(method, class)| {
            let points = method.curve.iter().map(|point| (x(point), point.reward)).collect();
            Line { label: &method.name, class, points, dots: true }
        })
        .collect();
    let bands: Vec<Band> = methods()
        .filter(|(method, _)| method.seeds > 1)
        .map(|(method, class)| {
            let edges = method.curve.iter().map(|point| (x(point), point.low, point.high)).collect();
            Band { class, edges }
        })
        .collect();
    chart::panel(&lines, &bands, &[], PANEL, over)
}

/// The names in as many rows as they need, and where these end.
fn legend(methods: &[Method], classes: &[String]) -> (String, f64) {
    let mut svg = String::new();
    let (mut left, mut y) = (MARGIN, LEGEND);
    for (method, class) in methods.iter().zip(classes) {
        let seeds = if method.seeds > 1 { format!("{} seeds", method.seeds) } else { "1 seed".into() };
        let label = format!("{} ({seeds})", method.name);
        // Nothing here measures text: a wide guess.
        let width = 62.0 + 7.5 * label.chars().count() as f64;
        if left > MARGIN && left + width > WIDTH - MARGIN {
            (left, y) = (MARGIN, y + ROW);
        }
        write!(svg, "<path class=\"line {class}\" d=\"M{left} {y}h36\"/>").ok();
        write!(svg, "<circle class=\"dot {class}\" cx=\"{}\" cy=\"{y}\" r=\"4\"/>", left + 18.0).ok();
        write!(svg, "<text x=\"{}\" y=\"{}\" class=\"name\">{}</text>", left + 44.0, y + 4.5, escape(&label)).ok();
        left += width;
    }
    (svg, y + ROW)
}

/// The file's own colours: it is shown where no page lends it any.
fn style(methods: usize) -> String {
    let mut css = String::from(
        "text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#5a5954}\
         .title{font-size:17px;font-weight:600;fill:#1c1c1a}.name{font-size:13px;fill:#1c1c1a}\
         .axis{font-size:13px;text-anchor:middle}.ylabel{text-anchor:end}.xlabel{text-anchor:middle}\
         .rule{stroke:#e6e5e0;fill:none}.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}\
         .dot{stroke-width:1.2}.band{fill-opacity:.14}",
    );
    for i in 0..methods {
        let (m, colour) = (i + 1, COLOURS[i % COLOURS.len()]);
        let (dash, inside) = if i < COLOURS.len() { ("none", colour) } else { ("6 4", "#fff") };
        write!(css, ".line.m{m}{{stroke:{colour};stroke-dasharray:{dash}}}.band.m{m}{{fill:{colour}}}").ok();
        write!(css, ".dot.m{m}{{fill:{inside};stroke:{colour}}}").ok();
    }
    css
}
