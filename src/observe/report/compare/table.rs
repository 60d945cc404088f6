//! The comparison as a Markdown table, its columns aligned for the terminal too.

use super::method::{Method, Point};
use crate::observe::report::{short, thousands};

/// What a method does not have.
const NONE: &str = "-";

/// One row a method, and the notes below.
pub fn render(methods: &[Method], reward: &str, baseline: Option<&Method>, colour_is_rewarded: bool) -> String {
    let mut head = vec![
        "method".into(),
        "seeds".into(),
        format!("held-out {reward}, start → end"),
        "best".into(),
        "exact reads".into(),
        if colour_is_rewarded { "colours".into() } else { "colours (never rewarded)".into() },
    ];
    if let Some(baseline) = baseline {
        head.push(format!("updates to {:.3}", baseline.best.reward));
        head.extend(["images".into(), "seconds".into()]);
    }
    head.push("s/update".into());

    let mut rows = vec![head];
    rows.extend(methods.iter().map(|method| row(method, baseline)));
    let mut text = aligned(&rows);
    text += &format!(
        "\nHeld-out {reward} is the mean over a method's seeds; in brackets the smallest and the largest of their ends.\n"
    );
    text += "Exact reads and colours are those of the end; seconds are of training, without the evaluations.\n";
    if let Some(Method { name, best, .. }) = baseline {
        text += &format!(
            "Updates, images and seconds to {:.3}: until the mean first reaches the best of `{name}`, on straight lines \
             between the evaluations.\n",
            best.reward
        );
    }
    for (method, note) in methods.iter().flat_map(|method| method.notes.iter().map(move |note| (method, note))) {
        text += &format!("\nNote: `{}`: {note}.\n", method.name);
    }
    text
}

fn row(method: &Method, baseline: Option<&Method>) -> Vec<String> {
    let Method { start, best, end, .. } = method;
    let spread = if method.seeds > 1 { format!(" [{:.3}, {:.3}]", end.low, end.high) } else { String::new() };
    let or_none = |value: Option<f64>, show: fn(f64) -> String| value.map_or(NONE.into(), show);
    let mut cells = vec![
        cell(&method.name),
        method.seeds.to_string(),
        format!("{:.3} → {:.3}{spread}", start.reward, end.reward),
        format!("{:.3} at {}", best.reward, best.update),
        or_none(method.exact, |share| format!("{:.1} %", 100.0 * share)),
        or_none(method.colours, |value| format!("{value:.3}")),
    ];
    if let Some(baseline) = baseline {
        let reached = method.reaches(baseline.best.reward);
        let when = |of: fn(&Point) -> f64, show| or_none(reached.as_ref().map(of), show);
        cells.push(when(|point| point.update, |updates| format!("{updates:.1}").trim_end_matches(".0").into()));
        cells.push(when(|point| point.images, thousands));
        cells.push(when(|point| point.seconds, thousands));
    }
    cells.push(or_none(method.seconds_per_update, short));
    cells
}

/// A name that cannot end its cell or its row.
fn cell(name: &str) -> String {
    name.replace('|', "\\|").replace(['\n', '\r'], " ")
}

/// Rows of equal length as a Markdown table; the first is the head.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |cells: &[String]| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("| {} |\n", padded.collect::<Vec<_>>().join(" | "))
    };
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
    let mut lines = rows.iter().map(|row| line(row));
    let head = lines.next().unwrap_or_default();
    head + &line(&rule) + &lines.collect::<String>()
}
