"""The manifest: what is compared, on what, and what is predicted (docs/comparison/manifest.toml)."""

import hashlib
import json
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from comparison import Refused, verdict

ROOT = Path(__file__).resolve().parents[2]
REGIME_KEYS = {
    "name",
    "title",
    "question",
    "main",
    "task",
    "metric",
    "arms",
    "baseline",
    "level",
    "seeds",
    "settings",
    "tuned_in",
    "server",
    "needs",
    "cost",
    "prediction",
}
NEEDED = {"name", "title", "question", "arms", "baseline", "level", "settings", "cost"}


@dataclass
class Job:
    """One run: an arm of a regime with a seed."""

    regime: str
    arm: str
    seed: int
    config: Path
    settings: dict  # dotted key -> value
    server: str | None
    digest: str  # of all that decides the result but the program

    @property
    def updates(self):
        return self.settings["run.updates"]


@dataclass
class Regime:
    """A regime with what it takes over from its task and the manifest's defaults."""

    name: str
    title: str
    question: str
    main: bool
    config: Path
    metric: str
    arms: list
    baseline: str
    level: float
    seeds: list
    settings: dict
    tuned_in: str | None  # the regime whose tuned learning rates it uses; its own name: its own
    server: str | None
    needs: dict  # arm -> what the program must have
    cost: str
    predictions: list


class Manifest:
    """The whole file; raises Refused where it cannot be used."""

    def __init__(self, path):
        self.path = path.resolve()
        try:
            self.text = self.path.read_text()
            data = tomllib.loads(self.text)
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise Refused(f"{path}: {error}") from None
        self.folder = self.path.parent
        self.common, self.tuning = flat(data.get("settings", {})), data.get("tune", {})
        self.methods = {name: flat(settings) for name, settings in data.get("method", {}).items()}
        self.tasks = data.get("task", {})
        self.regimes = {}
        for section in data.get("regime", []):
            regime = self.regime(section, data)
            self.regimes[regime.name] = regime
        for regime in self.regimes.values():
            self.check_tuning(regime)

    def check_tuning(self, regime):
        """All arms of a regime are tuned, or none."""
        if regime.tuned_in is None:
            return
        if regime.tuned_in not in self.regimes:
            raise Refused(
                f"{self.path.name}: regime {regime.name}: tuned_in = {regime.tuned_in!r} is no regime"
            )
        untuned = [arm for arm in regime.arms if arm not in self.regimes[regime.tuned_in].arms]
        if untuned:
            raise Refused(
                f"{self.path.name}: regime {regime.name}: tuned_in = {regime.tuned_in!r} has no {untuned[0]!r}"
            )

    def regime(self, section, data):
        where = f"{self.path.name}: regime {section.get('name', '?')}"
        missing, unknown = NEEDED - set(section), set(section) - REGIME_KEYS
        if missing or unknown:
            raise Refused(f"{where}: missing {sorted(missing)}, unknown {sorted(unknown)}")
        task = self.tasks.get(section.get("task", data.get("default_task")))
        if task is None:
            raise Refused(f"{where}: its task is none of {', '.join(self.tasks)}")
        for arm in (*section["arms"], section["baseline"]):
            if arm not in self.methods:
                raise Refused(f"{where}: {arm!r} is no [method]")
        predictions = section.get("prediction", [])
        for number, prediction in enumerate(predictions, 1):
            verdict.check(prediction, section["arms"], f"{where}: prediction {number}")
        return Regime(
            section["name"],
            section["title"],
            section["question"],
            section.get("main", False),
            ROOT / task["config"],
            section.get("metric", task["metric"]),
            section["arms"],
            section["baseline"],
            section["level"],
            section.get("seeds", data.get("seeds", [])),
            flat(task.get("settings", {})) | flat(section["settings"]),
            section.get("tuned_in"),
            section.get("server"),
            section.get("needs", {}),
            section["cost"],
            predictions,
        )

    def chosen(self, names):
        """Regimes by name; "main" stands for those of the main table, nothing for all."""
        wanted = []
        for name in names or self.regimes:
            group = [key for key, regime in self.regimes.items() if name == "main" and regime.main]
            if not group and name not in self.regimes:
                raise Refused(f"{name!r} is no regime; known: main, {', '.join(self.regimes)}")
            wanted += group or [name]
        return [self.regimes[name] for name in dict.fromkeys(wanted)]

    def job(self, regime, arm, seed, learning_rate=None, **more):
        """One run. Of a key that is set twice the method's value counts, then the regime's."""
        settings = self.common | regime.settings | self.methods[arm]
        if learning_rate is not None:
            settings["optim.lr"] = learning_rate
        settings |= {"run.seed": seed, "run.name": arm} | more
        what = [chain(regime.config), settings, regime.server]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return Job(regime.name, arm, seed, regime.config, settings, regime.server, digest)

    def commit(self):
        """The commit that holds the manifest as it stands, or None."""
        inside = ["git", "-C", str(self.folder)]
        try:
            changed = subprocess.run(
                [*inside, "status", "--porcelain", "--", self.path.name],
                capture_output=True,
                text=True,
            )
            last = subprocess.run(
                [*inside, "log", "-1", "--format=%H", "--", self.path.name],
                capture_output=True,
                text=True,
            )
        except OSError:
            return None
        committed = changed.returncode == 0 and not changed.stdout.strip()
        return (last.stdout.strip() or None) if committed else None


def flat(table, prefix=""):
    """A table as dotted keys; lists stay whole."""
    settings = {}
    for key, value in table.items():
        if isinstance(value, dict):
            settings |= flat(value, f"{prefix}{key}.")
        else:
            settings[prefix + key] = value
    return settings


def chain(config):
    """The texts of a configuration and of what it extends."""
    try:
        text = config.read_text()
        base = tomllib.loads(text).get("extends")
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise Refused(f"{config}: {error}") from None
    return [text, *(chain(config.parent / base) if base else [])]


def toml_value(value):
    """A value as --set reads it."""
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
