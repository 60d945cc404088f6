"""Results as they lie beside the manifest, results/REGIME.json, and as arms with seeds."""

import fcntl
import json
import os
from statistics import fmean

from comparison import Refused
from comparison.stats import time_to


def file(manifest, name):
    return manifest.folder / "results" / f"{name}.json"


def load(manifest, name):
    """The entries of a regime, or of "tune-REGIME"."""
    path = file(manifest, name)
    try:
        return json.loads(path.read_text())["runs"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError) as error:
        raise Refused(f"{path}: not a result file ({error}); remove it") from None


def save(manifest, name, entry):
    """Adds an entry, in place of an earlier one of the same settings; harnesses take turns."""
    path = file(manifest, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        others = [other for other in load(manifest, name) if other["digest"] != entry["digest"]]
        entries = sorted([*others, entry], key=order)
        part = path.with_suffix(".part")
        lines = ",\n".join(json.dumps(entry) for entry in entries)  # a line a run
        part.write_text(f'{{"runs": [\n{lines}\n]}}\n')
        os.replace(part, path)
    finally:
        os.close(folder)


def order(entry):
    return entry["arm"], entry["settings"]["optim.lr"], entry["seed"]


def tuned(manifest, regime):
    """What tuning found, by arm and learning rate: the end's mean over its seeds."""
    known = {job.digest for job in tuning_jobs(manifest, regime)}
    ends = {}
    for entry in load(manifest, f"tune-{regime.name}"):
        if entry["digest"] in known:
            rates = ends.setdefault(entry["arm"], {})
            end = entry["evaluations"][-1][regime.metric]
            rates.setdefault(entry["settings"]["optim.lr"], []).append(end)
    return {arm: {rate: fmean(of) for rate, of in rates.items()} for arm, rates in ends.items()}


def learning_rates(manifest, regime):
    """By arm, the learning rate with the best end; empty where nothing was tuned."""
    if regime.tuned_in is None:
        return {}
    found = tuned(manifest, manifest.regimes[regime.tuned_in])
    return {arm: max(ends, key=ends.get) for arm, ends in found.items()}


def tuning_jobs(manifest, regime):
    """Every arm with every learning rate of the grid, on seeds and noise of their own."""
    grid, seeds = manifest.tuning.get("grid", []), manifest.tuning.get("seeds", [])
    if not grid or set(seeds) & set(regime.seeds):
        raise Refused(f"{manifest.path}: [tune] needs a grid, and seeds that no regime has")
    more = {"eval.seed": manifest.tuning["eval_seed"], "run.eval_every": 0}
    return [
        manifest.job(regime, arm, seed, rate, **more)
        for arm in regime.arms
        for rate in grid
        for seed in seeds
    ]


def jobs(manifest, regime):
    """Every arm with every seed, at the learning rate that was tuned for it where one was."""
    rates = learning_rates(manifest, regime)
    return [
        manifest.job(regime, arm, seed, rates.get(arm))
        for seed in regime.seeds
        for arm in regime.arms
    ]


class Arm:
    """The results of one arm by seed."""

    def __init__(self, regime, name, entries):
        self.regime, self.name = regime, name
        self.entries = {entry["seed"]: entry for entry in entries}
        self.runs = {seed: entry["evaluations"] for seed, entry in self.entries.items()}

    def value(self, seed, measure="end", metric=None):
        points = self.runs[seed]
        key = metric or self.regime.metric
        return fmean(point[key] for point in points[1:]) if measure == "mean" else points[-1][key]

    def start(self, seed):
        return self.runs[seed][0][self.regime.metric]

    def last(self, axis, seed):
        return self.runs[seed][-1][axis]

    def time(self, axis, seed):
        """In updates, images or training seconds, when the level is reached; None: it is not."""
        return time_to(
            [(point[axis], point[self.regime.metric]) for point in self.runs[seed]],
            self.regime.level,
        )


def arms(manifest, regime):
    """By name, in the manifest's order; results of other settings than today's are left out."""
    known = {job.digest for job in jobs(manifest, regime)}
    entries = [entry for entry in load(manifest, regime.name) if entry["digest"] in known]
    return {
        name: Arm(regime, name, [entry for entry in entries if entry["arm"] == name])
        for name in regime.arms
    }
