"""docs/comparison/RESULTS.md and its pictures: what was asked, predicted and found."""

from collections import Counter
from statistics import fmean

from comparison import results, verdict
from comparison.picture import picture
from comparison.stats import mean_interval, median_time

HEAD = """# The methods compared, regime by regime

Written by `benchmarks/compare.py report` from `manifest.toml` (what is run, and what is predicted of it; committed before
the runs) and `results/`. The predictions are derived in [THEORY.md](THEORY.md).

Every number is of held-out prompts, from the same noise for all runs. Differences are paired by seed; brackets are 95 %
intervals over the seeds (expanded bootstrap quantiles, which allow for few seeds). A prediction **held** if its interval
lies wholly inside what was predicted, **failed** if wholly outside, and is **undecided** otherwise. Times to a level are
medians over the seeds, on straight lines between evaluations; a seed that does not reach it counts as longer than any.
"""


def render(manifest):
    """Writes the page and the pictures; returns the verdicts counted."""
    counts, sections = Counter(), []
    for regime in manifest.regimes.values():
        arms = results.arms(manifest, regime)
        verdicts = [verdict.judge(prediction, arms) for prediction in regime.predictions]
        counts.update(word for word, _ in verdicts)
        sections.append(section(manifest, regime, arms, verdicts))
    summary = ", ".join(
        f"{counts[word]} {word}"
        for word in (verdict.HELD, verdict.FAILED, verdict.UNDECIDED, verdict.PENDING)
    )
    page = "\n".join([HEAD, f"Predictions: {summary}.\n", *sections])
    (manifest.folder / "RESULTS.md").write_text(page)
    return summary


def section(manifest, regime, arms, verdicts):
    lines = [f"## {regime.title}\n", regime.question.strip() + "\n"]
    rows = [
        [verdict.describe(prediction, regime.level), prediction["why"], found or "-", word]
        for prediction, (word, found) in zip(regime.predictions, verdicts)
    ]
    lines.append(table(["predicted", "because", "found", "verdict"], rows))
    shown = {name: arm for name, arm in arms.items() if arm.runs}
    if not shown:
        return "\n".join([*lines, f"Not run yet. {regime.cost}\n"])
    lines.append(table(*measured(regime, shown)))
    lines.append(f"![Held-out values over updates](pictures/{regime.name}.svg)\n")
    folder = manifest.folder / "pictures"
    folder.mkdir(exist_ok=True)
    svg = picture(
        f"{regime.title}: {regime.metric}", "updates", curves(regime, shown), regime.level
    )
    (folder / f"{regime.name}.svg").write_text(svg)
    lines.append(notes(regime, arms) + "\n")
    tuned = tuning(manifest, regime)
    return "\n".join([*lines, tuned] if tuned else lines)


def measured(regime, arms):
    """Head and rows of the regime's main table."""
    level = f"{regime.level:g}"
    head = [
        "arm",
        "learning rate",
        "start -> end",
        f"end minus {regime.baseline}",
        "exact",
        f"updates to {level}",
        "images",
        "seconds",
    ]
    base = arms.get(regime.baseline)
    rows = []
    for arm in arms.values():
        seeds = sorted(arm.runs)
        end, low, high = mean_interval([arm.value(seed) for seed in seeds])
        paired = [seed for seed in seeds if base and seed in base.runs]
        difference = "-"
        if arm is not base and paired:
            difference = signed(
                *mean_interval([arm.value(seed) - base.value(seed) for seed in paired])
            )
        rates = sorted({entry["settings"]["optim.lr"] for entry in arm.entries.values()})
        reads = [arm.runs[seed][-1].get("eval.exact") for seed in seeds]
        rows.append(
            [
                arm.name,
                ", ".join(f"{rate:g}" for rate in rates),
                f"{fmean(arm.start(seed) for seed in seeds):.3f} -> {end:.3f}{interval(low, high)}",
                difference,
                "-" if None in reads else f"{100 * fmean(reads):.1f} %",
                *(when(arm, axis, seeds) for axis in ("update", "images", "seconds")),
            ]
        )
    return head, rows


def when(arm, axis, seeds):
    """The median time to the level, and how many seeds reach it where not all do."""
    times = [arm.time(axis, seed) for seed in seeds]
    reached, median = sum(time is not None for time in times), median_time(times)
    share = "" if reached == len(times) else f" ({reached} of {len(times)} reach it)"
    return ("not reached" if median is None else f"{median:,.0f}") + share


def curves(regime, arms):
    """Of every arm, the mean and the extremes of its seeds at the updates that all of them have."""
    drawn = []
    for arm in arms.values():
        values = [
            {point["update"]: point[regime.metric] for point in points}
            for points in arm.runs.values()
        ]
        common = sorted(set.intersection(*(set(of) for of in values)))
        points = []
        for update in common:
            here = [of[update] for of in values]
            points.append((update, fmean(here), min(here), max(here)))
        drawn.append((f"{arm.name} ({len(values)} seeds)", points))
    return drawn


def notes(regime, arms):
    """What a reader should know before believing the table."""
    entries = [entry for arm in arms.values() for entry in arm.entries.values()]
    words = [f"{len(entries)} runs; the band of the picture is the smallest and the largest seed."]
    missing = [
        f"{name}: {len(arm.runs)} of {len(regime.seeds)} seeds"
        for name, arm in arms.items()
        if len(arm.runs) < len(regime.seeds)
    ]
    if missing:
        words.append(f"Not complete: {'; '.join(missing)}.")
    points = {entry["evaluations"][-1].get("eval.images") for entry in entries}
    words.append(
        f"Images of an evaluation: {', '.join(f'{count:g}' for count in points if count)}."
    )
    words.append(f"Machine: {'; '.join(sorted({entry['machine'] for entry in entries}))}.")
    busy = [entry["load"] for entry in entries if entry["load"] > entry["jobs"] + 1]
    if busy:
        words.append(
            f"Seconds were measured beside other work (load up to {max(busy):g}): they are upper bounds."
        )
    programs = sorted({entry["program_digest"] for entry in entries})
    if len(programs) > 1:
        words.append(f"Runs of {len(programs)} builds of the program ({', '.join(programs)}).")
    commits = {entry.get("manifest") for entry in entries}
    if None in commits:
        words.append("**Trial: the predictions were not committed before these runs.**")
    words += [f"Predictions as of commit {commit[:10]}." for commit in sorted(commits - {None})]
    if regime.tuned_in is None:
        words.append("One learning rate for all; it was not tuned.")
    return " ".join(words)


def tuning(manifest, regime):
    """What each learning rate came to, of a regime whose own rates were tuned."""
    if regime.tuned_in != regime.name:
        return f"Learning rates as tuned in {regime.tuned_in}.\n" if regime.tuned_in else ""
    ends = results.tuned(manifest, regime)
    if not ends:
        return "Learning rates were not tuned.\n"
    chosen, grid = results.learning_rates(manifest, regime), manifest.tuning["grid"]
    rows = []
    for arm, found in ends.items():
        cells = {rate: f"{found[rate]:.3f}" if rate in found else "-" for rate in grid}
        cells[chosen[arm]] = f"**{cells[chosen[arm]]}**"
        rows.append([arm, *cells.values()])
    seeds = ", ".join(map(str, manifest.tuning["seeds"]))
    return f"Learning rates, end of a run of seed {seeds}, other evaluation noise:\n\n" + table(
        ["arm", *(f"{rate:g}" for rate in grid)], rows
    )


def interval(low, high):
    return "" if low is None else f" [{low:.3f}, {high:.3f}]"


def signed(mean, low, high):
    return f"{mean:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def table(head, rows):
    """A table in Markdown."""

    def line(cells):
        return (
            "| "
            + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
            + " |"
        )

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows), ""])
