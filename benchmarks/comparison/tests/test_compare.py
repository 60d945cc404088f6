"""The harness from end to end, with a program that only pretends to train."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

COMPARE = Path(__file__).resolve().parents[2] / "compare.py"

# Ends at 0.5 + strength x updates / 100 + lr; the arm "broken" ends early the first time.
PROGRAM = f"""#!{sys.executable}
import json, pathlib, signal, sys, time
if "--version" in sys.argv:
    sys.exit(print("flowrl-dist 9.9.9"))
settings = dict(item.split("=", 1) for flag, item in zip(sys.argv, sys.argv[1:]) if flag == "--set")
if "unknown.key" in settings:
    sys.exit("flowrl-dist: unknown: no such key")
if sys.argv[1] == "plan":
    sys.exit(0)
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "checkpoints").mkdir()
once = settings["run.name"] == '"broken"' and not (out / "begun").exists()
if settings["run.name"] == '"endless"':
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit((out / "saved").touch() or 75))
    (out / "begun").touch()
    while True:
        time.sleep(60)
(out / "begun").touch()
with open(out / "metrics.jsonl", "a") as lines:
    for update in range(0, int(settings["run.updates"]) + 1, 5):
        value = 0.5 + float(settings["strength"]) * update / 100 + float(settings["optim.lr"])
        print(json.dumps({{"update": update, "eval.m": value, "eval.images": 400}}), file=lines)
        if once:
            sys.exit(1)
        for at in range(update + 1, update + 6):
            print(json.dumps({{"update": at, "iteration": at - 1, "images": 8, "time.total": 2}}), file=lines)
"""

MANIFEST = """
default_task = "t"
seeds = [1, 2]
[task.t]
config = "configs/reference.toml"
metric = "eval.m"
[settings]
run.updates = 10
optim.lr = 0.0
[tune]
grid = [0.1, 0.2]
seeds = [9]
eval_seed = 5
[method.fast]
strength = 2.0
[method.slow]
strength = 1.0
[method.broken]
strength = 1.0
[method.endless]
strength = 1.0
[method.future]
"unknown.key" = 1
strength = 1.0
[[regime]]
name = "r"
title = "R"
question = "Which is faster?"
arms = ["fast", "slow"]
baseline = "slow"
level = 0.55
tuned_in = "TUNED"
cost = "Nothing."
settings = {}
[[regime.prediction]]
that = "slower"
arm = "slow"
than = "fast"
times = [1.5, 2.5]
why = "It is half as strong."
"""


class Harness(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.program = self.folder / "program"
        self.program.write_text(PROGRAM)
        self.program.chmod(0o755)
        self.write(MANIFEST.replace('tuned_in = "TUNED"\n', ""))

    def write(self, text):
        (self.folder / "manifest.toml").write_text(text)

    def compare(self, *arguments):
        command = [
            sys.executable,
            COMPARE,
            *arguments,
            "--manifest",
            self.folder / "manifest.toml",
            "--program",
            self.program,
            "--out",
            self.folder / "runs",
            "--jobs",
            "2",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    def refused(self, reason, *arguments):
        code, _, said = self.compare(*arguments)
        self.assertEqual((code, said.count("\n")), (2, 1), said)
        self.assertIn(reason, said)

    def entries(self, name="r"):
        return json.loads((self.folder / "results" / f"{name}.json").read_text())["runs"]

    def test_runs_are_run_once_and_judged(self):
        code, said, errors = self.compare("run", "--allow-uncommitted")
        self.assertEqual(
            (code, errors, said), (0, "", "1 held, 0 failed, 0 undecided, 0 not run\n")
        )
        entries = self.entries()
        self.assertEqual(len(entries), 4)
        self.assertEqual(
            entries[0]["evaluations"][-1],
            {"update": 10, "images": 80, "seconds": 20, "eval.m": 0.7, "eval.images": 400},
        )
        self.assertFalse(list(self.folder.glob("runs/*/*/*/checkpoints")))
        page = (self.folder / "RESULTS.md").read_text()
        for text in ("| held |", "2.00 [2.00, 2.00]", "+0.100 [+0.100, +0.100]", "**Trial:"):
            self.assertIn(text, page)
        self.assertIn("prefers-color-scheme", (self.folder / "pictures/r.svg").read_text())
        before = os.stat(self.folder / "results/r.json").st_mtime_ns
        self.compare("run", "--allow-uncommitted")
        self.assertEqual(os.stat(self.folder / "results/r.json").st_mtime_ns, before)
        self.program.write_text(PROGRAM + "# another build\n")
        self.compare("run", "--allow-uncommitted", "--keep")
        self.assertEqual(os.stat(self.folder / "results/r.json").st_mtime_ns, before)
        self.compare("run", "--allow-uncommitted")
        self.assertNotEqual(os.stat(self.folder / "results/r.json").st_mtime_ns, before)
        self.assertEqual(len(self.entries()), 4)

    def test_a_committed_manifest_is_named_in_the_results(self):
        self.refused("commit it first", "run")
        git = ["git", "-C", self.folder, "-c", "user.name=a", "-c", "user.email=a@b"]
        for arguments in (["init", "-q"], ["add", "manifest.toml"], ["commit", "-qm", "Predict"]):
            subprocess.run([*git, *arguments], check=True)
        self.assertEqual(self.compare("run")[0], 0)
        self.assertEqual({len(entry["manifest"]) for entry in self.entries()}, {40})
        self.write(MANIFEST.replace('tuned_in = "TUNED"\n', "") + "# changed\n")
        self.refused("commit it first", "run")

    def test_the_learning_rate_with_the_best_end_is_used(self):
        self.write(MANIFEST.replace("TUNED", "r"))
        self.refused("compare.py tune r", "run", "--allow-uncommitted")
        self.assertEqual(self.compare("tune", "--allow-uncommitted")[0], 0)
        self.assertEqual(len(self.entries("tune-r")), 4)
        self.compare("run", "--allow-uncommitted")
        self.assertEqual({entry["settings"]["optim.lr"] for entry in self.entries()}, {0.2})
        self.assertIn("| fast | 0.800 | **0.900** |", (self.folder / "RESULTS.md").read_text())

    def test_a_failed_run_is_named_and_continued(self):
        self.write(MANIFEST.replace('tuned_in = "TUNED"\n', "").replace('"fast"', '"broken"'))
        code, _, errors = self.compare("run", "--allow-uncommitted")
        self.assertEqual(code, 1)
        self.assertEqual(errors.count("failed: see"), 2)
        (folder,) = self.folder.glob("runs/run/r/broken-1-*")
        (folder / "checkpoints").rmdir()
        self.assertEqual(self.compare("run", "--allow-uncommitted", "--seeds", "1")[0], 0)
        self.assertEqual([entry["arm"] for entry in self.entries()].count("broken"), 1)

    def test_an_interrupt_lets_runs_save_and_leave(self):
        text = MANIFEST.replace('tuned_in = "TUNED"\n', "").replace('"fast"', '"endless"')
        self.write(text)
        out = self.folder / "runs"
        command = [sys.executable, COMPARE, "run", "--allow-uncommitted", "--jobs", "1"]
        command += ["--manifest", self.folder / "manifest.toml", "--program", self.program]
        compare = subprocess.Popen([*command, "--out", out], stderr=subprocess.PIPE, text=True)
        while not list(out.glob("run/r/endless-1-*/begun")):
            self.assertIsNone(compare.poll())
            time.sleep(0.05)
        compare.send_signal(signal.SIGTERM)
        _, said = compare.communicate(timeout=60)
        self.assertEqual(compare.returncode, 130)
        self.assertEqual(said, "compare: interrupted; the same command goes on\n")
        self.assertEqual(len(list(out.glob("run/r/*/saved"))), 1)

    def test_what_the_program_lacks_is_skipped_only_where_the_manifest_says_so(self):
        text = MANIFEST.replace('tuned_in = "TUNED"\n', "").replace(
            '["fast", "slow"]', '["fast", "slow", "future"]'
        )
        self.write(text)
        self.refused("no such key", "run", "--allow-uncommitted")
        self.write(
            text.replace("settings = {}", 'settings = {}\nneeds = { future = "a method to come" }')
        )
        code, _, errors = self.compare("run", "--allow-uncommitted")
        self.assertEqual(
            (code, errors), (0, "compare: r, future: skipped, needs a method to come\n")
        )
        self.assertEqual(len(self.entries()), 4)

    def test_mistakes_are_one_line(self):
        self.refused("'x' is no regime", "run", "x", "--allow-uncommitted")
        self.refused("--arms x: none of r", "run", "--allow-uncommitted", "--arms", "x")
        self.refused("--seeds 7: none of r", "run", "--allow-uncommitted", "--seeds", "7")
        self.write(MANIFEST.split("[[regime.prediction]]")[0].replace('tuned_in = "TUNED"\n', ""))
        self.refused("predict before you run", "run", "--allow-uncommitted")
        self.write(MANIFEST.replace('baseline = "slow"', 'baseline = "x"'))
        self.refused("'x' is no [method]", "status")
        self.write("a = ")
        self.refused("Invalid value", "status")


if __name__ == "__main__":
    unittest.main()
