#!/usr/bin/env python3
"""Compares the methods in regimes whose outcome is predicted beforehand.

    benchmarks/compare.py status              what is predicted, run and open, and what it would cost
    benchmarks/compare.py tune [REGIME...]    learning rates of every arm, on a seed of their own
    benchmarks/compare.py run [REGIME...]     the runs; "main": those of the main table; nothing: all
    benchmarks/compare.py report              docs/comparison/RESULTS.md from what there is

docs/comparison/manifest.toml says what is run; a regime runs only if its predictions are committed.
A run is one process with one thread, --jobs of them side by side: results depend neither on how
many nor on the number of ranks. Runs that are done are skipped; one that was interrupted goes on
from its checkpoint. Ctrl-C lets the runs save and leave.
Exit codes: 0 done, 1 a run failed, 2 wrong usage or manifest, 130 interrupted.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from comparison import Refused, report, results
from comparison.manifest import ROOT, Manifest
from comparison.runs import Program, Runner


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["status", "tune", "run", "report"])
    parser.add_argument("regime", nargs="*", help='names of regimes, or "main"; nothing: all')
    parser.add_argument("--manifest", type=Path, default=ROOT / "docs/comparison/manifest.toml")
    parser.add_argument(
        "--program", default=os.environ.get("FLOWRL_BIN", ROOT / "target/release/flowrl-dist")
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs/comparison", help="where the run folders go"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="processes side by side (default: the cores)",
    )
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument(
        "--untuned", action="store_true", help="where nothing was tuned, the settings' rates"
    )
    parser.add_argument(
        "--allow-uncommitted", action="store_true", help="a trial: the results are marked as one"
    )
    parser.add_argument(
        "--keep", action="store_true", help="results of another build of the program count as done"
    )
    return parser.parse_args()


class Progress:
    """Tells a terminal what is done and how long the rest may take; silent in a pipe."""

    def __init__(self, total, jobs):
        self.total, self.jobs, self.done, self.start = total, jobs, 0, time.monotonic()

    def tell(self, job, entry, metric):
        self.done += 1
        if not sys.stdout.isatty():
            return
        pace = (time.monotonic() - self.start) / self.done
        first, last = entry["evaluations"][0][metric], entry["evaluations"][-1][metric]
        print(
            f"[{self.done}/{self.total}] {job.regime}: {job.arm}, seed {job.seed}, "
            f"lr {job.settings['optim.lr']:g}: {first:.3f} -> {last:.3f}; about {pace * (self.total - self.done) / 60:.0f} min left",
            flush=True,
        )


def open_jobs(manifest, regime, options, program):
    """The jobs of a regime that are chosen, not done, and possible with this program."""
    if options.action == "tune":
        jobs = results.tuning_jobs(manifest, regime)
    else:
        jobs = results.jobs(manifest, regime)
        if options.seeds:
            jobs = [job for job in jobs if job.seed in options.seeds]
        if regime.tuned_in and not options.untuned:
            missing = set(regime.arms) - set(results.learning_rates(manifest, regime))
            if missing:
                raise Refused(
                    f"{regime.name}: no learning rate was tuned for {sorted(missing)[0]}: "
                    f"compare.py tune {regime.tuned_in}, or --untuned"
                )
    if options.arms:
        jobs = [job for job in jobs if job.arm in options.arms]
    done = {
        entry["digest"]
        for entry in results.load(manifest, store(options, regime))
        if options.keep or entry["program_digest"] == program.digest
    }
    return possible([job for job in jobs if job.digest not in done], regime, program)


def possible(jobs, regime, program):
    """The jobs that the program takes; what it may lack, by the manifest, is skipped with a word."""
    refusals = {}
    for job in jobs:
        if job.arm not in refusals:
            refusals[job.arm] = program.refusal(job)
    for arm, reason in refusals.items():
        if reason is None:
            continue
        needs = regime.needs.get(arm)
        if needs is None:
            raise Refused(f"{regime.name}, {arm}: {reason}")
        print(f"compare: {regime.name}, {arm}: skipped, needs {needs}", file=sys.stderr)
    return [job for job in jobs if refusals[job.arm] is None]


def check_choice(options, regimes):
    """Refuses arms and seeds that no chosen regime has."""
    for arm in options.arms or []:
        if not any(arm in regime.arms for regime in regimes):
            raise Refused(f"--arms {arm}: none of {', '.join(r.name for r in regimes)} has it")
    for seed in options.seeds or []:
        if not any(seed in regime.seeds for regime in regimes):
            raise Refused(f"--seeds {seed}: none of {', '.join(r.name for r in regimes)} has it")


def store(options, regime):
    return f"tune-{regime.name}" if options.action == "tune" else regime.name


def launch(manifest, options):
    """`run` and `tune`; returns the exit code."""
    program, commit = Program(options.program), manifest.commit()
    if options.jobs < 1:
        raise Refused(f"--jobs {options.jobs}; give 1 or more")
    if commit is None and not options.allow_uncommitted:
        raise Refused(
            f"{manifest.path}: commit it first, so that its predictions precede the results; "
            "or, for a trial, --allow-uncommitted"
        )
    regimes, work = manifest.chosen(options.regime), []
    check_choice(options, regimes)
    for regime in regimes:
        if not regime.predictions:
            raise Refused(
                f"{manifest.path}: regime {regime.name} has no [[regime.prediction]]; "
                "predict before you run"
            )
        if options.action == "run" or regime.tuned_in == regime.name:
            work += open_jobs(manifest, regime, options, program)
    progress = Progress(len(work), options.jobs)

    def finished(job, entry):
        regime = manifest.regimes[job.regime]
        results.save(manifest, store(options, regime), entry | {"manifest": commit})
        progress.tell(job, entry, regime.metric)

    runner = Runner(program, options.out / options.action, options.jobs, finished)
    failed = runner.run(work)
    for job in failed:
        where = f"{job.regime}, {job.arm}, seed {job.seed}"
        print(f"compare: {where} failed: see {runner.place(job)}/output.log", file=sys.stderr)
    print(report.render(manifest))
    return 1 if failed else 0


def status(manifest, options):
    """What is there, and what is open."""
    for regime in manifest.chosen(options.regime):
        wanted = results.jobs(manifest, regime)
        done = sum(len(arm.runs) for arm in results.arms(manifest, regime).values())
        tuned = len(results.learning_rates(manifest, regime))
        print(
            f"{regime.name}: {done} of {len(wanted)} runs, {len(regime.predictions)} predictions, "
            f"{tuned} of {len(regime.arms)} rates tuned. {regime.cost}"
        )
    commit = manifest.commit()
    print(f"manifest: {'committed, ' + commit[:10] if commit else 'not committed'}")
    return 0


def main():
    options = arguments()
    manifest = Manifest(options.manifest)
    if options.action == "status":
        return status(manifest, options)
    if options.action == "report":
        print(report.render(manifest))
        return 0
    return launch(manifest, options)


def interrupt(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        sys.exit(main())
    except Refused as error:
        print(f"compare: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("compare: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
