//! The page, section by section.

use super::chart::{self, Line, Mark, SMALL, WIDE};
use super::run::{Points, Run, names, points, sum};
use super::{escape, short, thousands};
use crate::observe::progress::in_words;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::fmt::Write;
use std::fs;
use std::path::Path;

const STYLE: &str = include_str!("style.css");
const CLASSES: [&str; 8] = ["s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8"];

/// The whole page.
pub fn render(run: &Run) -> String {
    let name = escape(&run.name);
    let sections = [heads(run), rewards(run), evaluations(run), samples(run), training(run), phases(run), config(run)];
    let mut body = sections.concat();
    if run.updates.is_empty() && run.evaluations.is_empty() {
        body.insert_str(0, "<p class=\"card empty\">No metrics yet: metrics.jsonl is missing or empty.</p>");
    }
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{name} · flowrl-dist</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<header><h1>{name}</h1><p>{}</p></header>\n{body}\n\
         <footer>Written by flowrl-dist {} from the run folder. Hover over a curve for its values.</footer>\n\
         </main>\n</body>\n</html>\n",
        subtitle(run),
        env!("CARGO_PKG_VERSION"),
    )
}

/// `flow-awr on glyphs · update 60 of 60`
fn subtitle(run: &Run) -> String {
    let mut parts = Vec::new();
    match (run.setting("method", "name"), run.setting("model", "kind")) {
        (Some(method), Some(model)) => parts.push(format!("{method} on {model}")),
        (method, model) => parts.extend(method.or(model)),
    }
    if let Some(last) = run.updates.keys().last() {
        let planned = run.setting("run", "updates").map(|total| format!(" of {total}")).unwrap_or_default();
        parts.push(format!("update {last}{planned}"));
    }
    parts.extend(run.setting("run", "seed").map(|seed| format!("seed {seed}")));
    escape(&parts.join(" · "))
}

/// The few numbers that say how the run went.
fn heads(run: &Run) -> String {
    let mut cards = String::new();
    let main = run.rewards().first().map(|first| format!("eval.reward.{first}.mean"));
    let evaluated = names(&run.evaluations);
    let held_out = evaluated.iter().copied().find(|name| main.as_deref() == Some(*name));
    let held_out = held_out.or_else(|| evaluated.into_iter().find(|name| is_reward(name)));
    let trained = names(&run.updates).into_iter().find(|name| is_reward(name));
    if let Some(name) = held_out {
        cards += &change("Held-out reward", &points(&run.evaluations, name), short);
    } else if let Some(name) = trained {
        cards += &change("Training reward", &points(&run.updates, name), short);
    }
    cards += &change("Exact reads", &points(&run.evaluations, "eval.exact"), percent);

    let (images, training) = run.spent(u64::MAX);
    let seconds = training + sum(&run.evaluations, "time.eval");
    if seconds > 0.0 {
        let rate = training / run.updates.len().max(1) as f64;
        cards += &head("Wall time", &in_words(seconds), &format!("{} s per update", short(rate)));
    }
    if images > 0.0 {
        cards += &head("Images sampled", &thousands(images), &format!("in {} updates", run.updates.len()));
    }
    if cards.is_empty() { cards } else { format!("<section class=\"heads\">{cards}</section>\n") }
}

/// A card with the first and last value of a metric; nothing if it has none.
fn change(title: &str, points: &Points, show: fn(f64) -> String) -> String {
    let finite: Points = points.iter().copied().filter(|(_, value)| value.is_finite()).collect();
    let (Some((from, before)), Some((to, after))) = (finite.first(), finite.last()) else { return String::new() };
    if from == to {
        return head(title, &show(*after), &format!("at update {to}"));
    }
    let gain = after - before;
    let (class, sign) = if gain >= 0.0 { ("up", "+") } else { ("down", "−") };
    head(
        title,
        &format!("<span class=\"from\">{} →</span> {}", show(*before), show(*after)),
        &format!("<span class=\"{class}\">{sign}{}</span> from update {from} to {to}", show(gain.abs())),
    )
}

fn head(title: &str, big: &str, sub: &str) -> String {
    format!("<div class=\"card head\"><h3>{title}</h3><div class=\"big\">{big}</div><p class=\"sub\">{sub}</p></div>")
}

/// One wide chart for every reward: in training, and on the held-out prompts, with the beginnings of stages.
fn rewards(run: &Run) -> String {
    let mut cards = String::new();
    let mark = |(at, stage)| Mark { at, label: format!("stage {stage} begins (update {at})") };
    let marks: Vec<Mark> = run.stages().into_iter().map(mark).collect();
    for name in names(&run.updates).into_iter().filter(|name| is_reward(name)) {
        let held_out = points(&run.evaluations, &format!("eval.{name}"));
        let mut lines = vec![Line { label: "training", class: "s1", points: points(&run.updates, name), dots: false }];
        if !held_out.is_empty() {
            lines.push(Line { label: "held out", class: "s2", points: held_out, dots: true });
        }
        cards += &marked_card(&title(name), &lines, &marks, WIDE);
    }
    if cards.is_empty() { cards } else { format!("<section><h2>Reward</h2>{cards}</section>\n") }
}

/// The other metrics of the evaluations, and all of them as a table.
fn evaluations(run: &Run) -> String {
    let all = names(&run.evaluations);
    let trained = names(&run.updates);
    let shown = |name: &&str| {
        let name = name.strip_prefix("eval.").unwrap_or("");
        !name.is_empty() && name != "images" && !(is_reward(name) && trained.contains(&name))
    };
    let mut cards = String::new();
    for name in all.iter().copied().filter(shown) {
        let line = Line { label: name, class: "s2", points: points(&run.evaluations, name), dots: true };
        cards += &card(&title(name), &[line], SMALL);
    }
    if all.is_empty() {
        return String::new();
    }
    let cards = if cards.is_empty() { cards } else { format!("<div class=\"row\">{cards}</div>") };
    format!("<section><h2>Held-out evaluation</h2>{cards}{}</section>\n", evaluation_table(run, &all))
}

fn evaluation_table(run: &Run, names: &[&str]) -> String {
    let mut table = String::from("<tr><th>update</th>");
    for name in names {
        write!(table, "<th>{}</th>", escape(name.strip_prefix("eval.").unwrap_or(name))).ok();
    }
    table += "</tr>";
    for (update, record) in &run.evaluations {
        write!(table, "<tr><td>{update}</td>").ok();
        for name in names {
            let value = record.get(*name).and_then(|value| value.as_f64()).unwrap_or(f64::NAN);
            write!(table, "<td>{}</td>", short(value)).ok();
        }
        table += "</tr>";
    }
    format!(
        "<details><summary>Evaluations as a table</summary><div class=\"card scroll\"><table>{table}</table></div></details>"
    )
}

/// Comparisons at full width, then the first and last grid side by side.
fn samples(run: &Run) -> String {
    let mut figures: String = run.pictures.iter().filter_map(|path| figure(path, &plain(path))).collect();
    let mut pair = String::new();
    if let Some((update, path)) = run.grids.first() {
        pair += &figure(path, &format!("update {update}")).unwrap_or_default();
    }
    if let Some((update, path)) = run.grids.last().filter(|_| run.grids.len() > 1) {
        pair += &figure(path, &format!("update {update}")).unwrap_or_default();
    }
    if !pair.is_empty() {
        write!(figures, "<div class=\"pair\">{pair}</div>").ok();
    }
    if figures.is_empty() { figures } else { format!("<section><h2>Samples</h2>{figures}</section>\n") }
}

/// A picture with its title above it; nothing if it cannot be read.
fn figure(path: &Path, title: &str) -> Option<String> {
    let png = fs::read(path).ok()?;
    let (title, data) = (escape(title), STANDARD.encode(png));
    Some(format!(
        "<figure class=\"card\"><figcaption>{title}</figcaption>\
         <img alt=\"samples, {title}\" src=\"data:image/png;base64,{data}\"></figure>"
    ))
}

/// Loss and its parts, then every other number of the updates.
fn training(run: &Run) -> String {
    let of = |name: &str| points(&run.updates, name);
    let names = names(&run.updates);
    let (losses, others): (Vec<_>, Vec<_>) = names
        .into_iter()
        .filter(|name| !is_reward(name) && !name.starts_with("time.") && !["images", "stage"].contains(name))
        .partition(|name| *name == "loss" || name.starts_with("loss."));

    let mut cards = String::new();
    let lines: Vec<_> = losses
        .iter()
        .zip(CLASSES)
        .map(|(name, class)| Line { label: name, class, points: of(name), dots: false })
        .collect();
    if !lines.is_empty() {
        cards += &card("Loss", &lines, SMALL);
    }
    let mut constant = Vec::new();
    for name in others {
        let points = of(name);
        match points.first() {
            Some((_, first)) if points.iter().all(|(_, value)| value == first) && points.len() > 1 => {
                constant.push(format!("{} {}", escape(name), short(*first)));
            }
            _ => cards += &card(&title(name), &[Line { label: name, class: "s1", points, dots: false }], SMALL),
        }
    }
    if !constant.is_empty() {
        constant.insert(0, "Constant throughout:".into());
    }
    if cards.is_empty() && constant.is_empty() {
        return String::new();
    }
    let constant = format!("<p class=\"sub\">{}</p>", constant.join(" &nbsp; "));
    format!("<section><h2>Training</h2><div class=\"row\">{cards}</div>{constant}</section>\n")
}

/// Times that are no phase of the training thread.
const NO_PHASES: [&str; 2] = ["time.total", BUSY];
const BUSY: &str = "time.reward_busy";

/// Where the time of an update goes.
fn phases(run: &Run) -> String {
    let names: Vec<_> =
        names(&run.updates).into_iter().filter(|name| name.starts_with("time.") && !NO_PHASES.contains(name)).collect();
    let seconds = |update: &u64, name: &str| {
        let value = run.updates.get(update).and_then(|record| record.get(name)?.as_f64());
        (*update as f64, value.unwrap_or(0.0))
    };
    let mut parts: Vec<(&str, Points)> = names
        .iter()
        .map(|name| (&name["time.".len()..], run.updates.keys().map(|update| seconds(update, name)).collect()))
        .collect();
    // What no phase accounts for.
    let other: Points = run
        .updates
        .keys()
        .map(|update| {
            let known: f64 = names.iter().map(|name| seconds(update, name).1).sum();
            (*update as f64, (seconds(update, "time.total").1 - known).max(0.0))
        })
        .collect();
    let total = |points: &Points| points.iter().map(|(_, seconds)| seconds).sum::<f64>();
    let all: f64 = parts.iter().map(|(_, points)| total(points)).sum::<f64>() + total(&other);
    if total(&other) > 0.02 * all {
        parts.push(("other", other));
    }
    // Colours run out after eight: the smallest phases share the last one.
    let lines: Vec<_> = parts
        .into_iter()
        .enumerate()
        .map(|(i, (label, points))| Line { label, class: CLASSES[i.min(CLASSES.len() - 1)], points, dots: false })
        .collect();
    let svg = chart::stack(&lines, WIDE);
    if svg.is_empty() {
        return String::new();
    }
    let mut legend = String::new();
    for Line { label, class, points, .. } in &lines {
        let (mean, share) = (total(points) / points.len().max(1) as f64, total(points) / all);
        let (label, mean, share) = (escape(label), short(mean), percent(share));
        write!(legend, "<li><i class=\"{class}\"></i>{label} <b>{mean} s</b> · {share}</li>").ok();
    }
    let busy: Points = run.updates.keys().map(|update| seconds(update, BUSY)).collect();
    let busy = match total(&busy) {
        0.0 => String::new(),
        all => format!(
            "<p class=\"sub\">The rewards took {} s an update; training waited for them as long as “reward” says.</p>",
            short(all / busy.len() as f64)
        ),
    };
    format!(
        "<section><h2>Time</h2><div class=\"card\"><div class=\"top\"><h3>Seconds of every update</h3></div>\
         <ul class=\"legend\">{legend}</ul>{svg}{busy}</div></section>\n"
    )
}

/// The resolved configuration, a card for every table.
fn config(run: &Run) -> String {
    let mut cards = String::new();
    config_cards("", &run.config, &mut cards);
    if cards.is_empty() {
        return cards;
    }
    format!("<section><h2>Configuration</h2><div class=\"config\">{cards}</div></section>\n")
}

fn config_cards(name: &str, table: &toml::Table, cards: &mut String) {
    let mut rows = String::new();
    let mut inner: Vec<(String, &toml::Table)> = Vec::new();
    for (key, value) in table {
        let full = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
        match value {
            toml::Value::Table(table) => inner.push((full, table)),
            toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
                inner.extend(items.iter().filter_map(|item| Some((full.clone(), item.as_table()?))));
            }
            value => {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                write!(rows, "<tr><th>{}</th><td>{}</td></tr>", escape(key), escape(&text)).ok();
            }
        }
    }
    if !rows.is_empty() {
        let name = escape(if name.is_empty() { "top level" } else { name });
        write!(cards, "<div class=\"card\"><h3>{name}</h3><table>{rows}</table></div>").ok();
    }
    inner.iter().for_each(|(name, table)| config_cards(name, table, cards));
}

/// A chart with its title, legend and last value; nothing if there is nothing to draw.
fn card(title: &str, lines: &[Line], size: chart::Size) -> String {
    marked_card(title, lines, &[], size)
}

fn marked_card(title: &str, lines: &[Line], marks: &[Mark], size: chart::Size) -> String {
    let svg = chart::lines(lines, marks, size);
    if svg.is_empty() {
        return String::new();
    }
    let last = |line: &Line| line.points.iter().rev().map(|p| p.1).find(|y| y.is_finite());
    let mut now = String::new();
    let mut legend = String::new();
    if let [line] = lines {
        now = last(line).map(|value| format!("<b>{}</b>", short(value))).unwrap_or_default();
    } else {
        for line in lines {
            let (class, label) = (line.class, escape(line.label));
            let value = last(line).map(short).unwrap_or_default();
            write!(legend, "<li><i class=\"{class}\"></i>{label} <b>{value}</b></li>").ok();
        }
        legend = format!("<ul class=\"legend\">{legend}</ul>");
    }
    let lost = lines.iter().flat_map(|line| &line.points).filter(|(_, y)| !y.is_finite()).count();
    let warning = match lost {
        0 => String::new(),
        1 => "<p class=\"warn\">1 value is not finite.</p>".into(),
        n => format!("<p class=\"warn\">{n} values are not finite.</p>"),
    };
    format!(
        "<div class=\"card\"><div class=\"top\"><h3>{}</h3><span class=\"now\">{now}</span></div>{legend}{svg}{warning}</div>",
        escape(title)
    )
}

/// Whether a name is the mean of a reward, in training or evaluation.
fn is_reward(name: &str) -> bool {
    name.strip_prefix("eval.").unwrap_or(name).starts_with("reward.") && name.ends_with(".mean")
}

/// A metric's name for people.
fn title(name: &str) -> String {
    match name {
        "grad_norm" => "Gradient norm".into(),
        "lr" => "Learning rate".into(),
        "eval.exact" => "Exact reads".into(),
        "advantage.zero_groups" => "Groups without a signal".into(),
        "advantage.clipped" => "Advantages clipped".into(),
        _ => {
            let name = name.strip_prefix("eval.").unwrap_or(name);
            let (name, spread) = match name.strip_prefix("reward.").and_then(|rest| rest.rsplit_once('.')) {
                Some((reward, "mean")) => (reward, ""),
                Some((reward, "std")) => (reward, ", spread between images"),
                _ => (name, ""),
            };
            format!("{}{spread}", name.replace(['_', '.'], " "))
        }
    }
}

/// `samples/before_after.png` -> `before after`.
fn plain(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().replace(['_', '-'], " ")
}

fn percent(share: f64) -> String {
    format!("{:.*} %", usize::from(share > 0.0 && share < 0.1), share * 100.0)
}
