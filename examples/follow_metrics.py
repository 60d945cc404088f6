#!/usr/bin/env python3
"""Follows the metrics of a run into Weights & Biases, Trackio or MLflow, or to the terminal.

    python3 examples/follow_metrics.py runs/glyphs                       # prints
    python3 examples/follow_metrics.py runs/glyphs --to trackio          # pip install trackio
    python3 examples/follow_metrics.py runs/glyphs --to wandb --offline  # pip install wandb
    python3 examples/follow_metrics.py runs/glyphs --to mlflow           # pip install mlflow-skinny

It reads RUN/metrics.jsonl (one JSON object per update and per evaluation) from the beginning, and
goes on while the run does: as long as RUN/.running is there, or for ever with --keep. Where to send
to is the package's own affair: WANDB_API_KEY, MLFLOW_TRACKING_URI (into files of its own, where no
server is: MLFLOW_ALLOW_FILE_STORE=true), TRACKIO_SPACE_ID. Needs nothing but Python 3.8 and the
package that --to names. It changes nothing in the run folder.

A run that resumes from an older checkpoint writes the later updates again; those are sent once.
Tried on a finished run with trackio 0.43.0, wandb 0.31.0 (offline) and mlflow-skinny 3.17.2
(files).
"""

import argparse
import json
import os
import sys
import time


def config_of(run):
    """The run's configuration as `section.key: value`; empty before Python 3.11 (no TOML)."""
    try:
        import tomllib
    except ImportError:
        return {}
    with open(os.path.join(run, "config.toml"), "rb") as file:
        return dict(flat("", tomllib.load(file)))


def flat(prefix, value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(f"{prefix}.{key}" if prefix else key, inner)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from flat(f"{prefix}.{index}", inner)
    else:
        yield prefix, value


def lines_of(run, keep, pause):
    """Every whole line of metrics.jsonl, now and as it grows; again where it was cut."""
    path, done = os.path.join(run, "metrics.jsonl"), 0
    while True:
        going_on = keep or os.path.exists(os.path.join(run, ".running"))
        if os.path.exists(path):
            if os.path.getsize(path) < done:
                done = 0
            with open(path, "rb") as file:
                file.seek(done)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    done += len(line)
                    yield json.loads(line)
        if not going_on:
            return
        time.sleep(pause)


def to_print(project, run, config, offline):
    def log(metrics, step):
        names = ("loss", "grad_norm", "time.total")
        shown = [k for k in metrics if k.startswith(("eval.", "reward.")) or k in names]
        print(step, *(f"{name} {metrics[name]:.4g}" for name in shown), flush=True)

    return log, lambda: None


def to_trackio(project, run, config, offline):
    import trackio

    trackio.init(project=project, name=run, config=config)
    return lambda metrics, step: trackio.log(metrics, step=step), trackio.finish


def to_wandb(project, run, config, offline):
    import wandb

    wandb.init(project=project, name=run, config=config, mode="offline" if offline else None)
    return lambda metrics, step: wandb.log(metrics, step=step), wandb.finish


def to_mlflow(project, run, config, offline):
    import mlflow

    mlflow.set_experiment(project)
    mlflow.start_run(run_name=run)
    mlflow.log_params(config)
    return lambda metrics, step: mlflow.log_metrics(metrics, step=step), mlflow.end_run


def main():
    sinks = {f.__name__[3:]: f for f in (to_print, to_trackio, to_wandb, to_mlflow)}
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--to", choices=sinks, default="print")
    parser.add_argument("--project", default="flowrl-dist", help="or experiment [%(default)s]")
    parser.add_argument("--offline", action="store_true", help="wandb: files, and no server")
    parser.add_argument("--keep", action="store_true", help="waits for the run's next start")
    parser.add_argument("--pause", type=float, default=5, help="seconds to wait [%(default)s]")
    args = parser.parse_args()
    if not os.path.exists(os.path.join(args.run, "config.toml")):
        parser.error(f"{args.run} has no config.toml; give a run folder (that of --out)")
    try:
        name = os.path.basename(os.path.abspath(args.run))
        log, finish = sinks[args.to](args.project, name, config_of(args.run), args.offline)
    except ImportError as error:
        parser.error(f"--to {args.to}: {error}; install the package (see --help)")
    sent = set()
    try:
        for metrics in lines_of(args.run, args.keep, args.pause):
            step, kind = metrics.pop("update"), "iteration" in metrics
            if (step, kind) not in sent:
                sent.add((step, kind))
                log(metrics, step)
    except KeyboardInterrupt:
        print("follow_metrics: stopped", file=sys.stderr)
    finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
