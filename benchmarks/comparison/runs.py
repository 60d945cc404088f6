"""Runs of the program: started, continued, read."""

import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from comparison import Refused
from comparison.manifest import ROOT, toml_value

PROXY = ROOT / "benchmarks" / "reward_proxy.py"


class Program:
    """The program that is run: where it is, and what it is."""

    def __init__(self, path):
        self.path = Path(path).resolve()
        try:
            self.digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
            said = subprocess.run(
                [str(self.path), "--version"], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise Refused(
                f"{path}: {error}; build it, or name another with --program or FLOWRL_BIN"
            ) from None
        self.version = said.stdout.strip()

    def arguments(self, job, address=""):
        """The command line of a run, without its folder."""
        arguments = ["--config", str(job.config)]
        for key, value in job.settings.items():
            arguments += ["--set", f"{key}={toml_value(value).replace('{server}', address)}"]
        return arguments

    def refusal(self, job):
        """Why the program does not take this run; None: it does."""
        plan = [str(self.path), "plan", *self.arguments(job, "http://127.0.0.1:9")]
        done = subprocess.run(plan, capture_output=True, text=True)
        return (
            None
            if done.returncode == 0
            else (done.stderr.strip().splitlines() or ["no reason"])[-1]
        )


def machine():
    """What kind of machine this is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def records(folder):
    """A run's metrics by update, the last line of each: (updates, evaluations)."""
    updates, evaluations = {}, {}
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return updates, evaluations
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that a killed run did not end
        kind = evaluations if any(key.startswith("eval.") for key in record) else updates
        kind[record["update"]] = record
    return updates, evaluations


def curve(folder):
    """Evaluations in order: held-out values, and the images and training seconds until then."""
    updates, evaluations = records(folder)
    points = []
    for update, evaluation in sorted(evaluations.items()):
        # What belongs to an iteration stands in each of its updates: it counts once.
        iterations = {record["iteration"]: record for at, record in updates.items() if at <= update}
        values = {key: value for key, value in evaluation.items() if key.startswith("eval.")}
        points.append(
            {
                "update": update,
                "images": sum(record["images"] for record in iterations.values()),
                "seconds": round(sum(record["time.total"] for record in iterations.values()), 1),
                **values,
            }
        )
    return points


def is_done(points, job):
    return bool(points) and points[-1]["update"] >= job.updates


class Server:
    """The reward server of runs that name one: reward_proxy.py before the program's own."""

    def __init__(self, program, what, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = [
            sys.executable,
            str(PROXY),
            what,
            "--program",
            str(program.path),
            "--listen",
            self.address,
        ]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.PIPE)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.2)
        self.close()
        raise Refused(f"the reward server of {what!r} did not start: see {log.name}")

    def close(self):
        self.process.stdin.close()  # it ends with its parent
        self.process.wait()


class Runner:
    """Runs jobs side by side, one thread each, and hands each result to `finished`."""

    def __init__(self, program, folder, jobs, finished):
        self.program, self.folder, self.jobs, self.finished = program, folder, jobs, finished
        self.children, self.lock, self.leaving = set(), threading.Lock(), False

    def run(self, work):
        """Runs [Job]; returns the jobs that failed. An interrupt lets the runs save and leave."""
        failed, servers = [], {}
        self.folder.mkdir(parents=True, exist_ok=True)
        log = open(self.folder / "servers.log", "ab")
        for what in {job.server for job in work if job.server}:
            servers[what] = Server(self.program, what, log)
        pool = ThreadPoolExecutor(self.jobs)
        try:
            futures = {pool.submit(self.one, job, servers.get(job.server)): job for job in work}
            for future in as_completed(futures):
                entry = future.result()
                if entry is None:
                    failed.append(futures[future])
                else:
                    self.finished(futures[future], entry)
        except KeyboardInterrupt:
            self.leave()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            for server in servers.values():
                server.close()
            log.close()
        return failed

    def leave(self):
        """Every run saves a checkpoint and ends."""
        with self.lock:
            self.leaving = True
            for child in self.children:
                child.send_signal(signal.SIGUSR1)

    def place(self, job):
        name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in job.arm)
        return (
            self.folder / job.regime / f"{name}-{job.seed}-{job.digest}-{self.program.digest[:6]}"
        )

    def one(self, job, server):
        """The result of a run, continued from its checkpoint if it has one; None: it failed."""
        folder = self.place(job)
        folder.mkdir(parents=True, exist_ok=True)
        load = os.getloadavg()[0]
        if not is_done(curve(folder), job):
            arguments = self.program.arguments(job, server.address if server else "")
            environment = os.environ | {"RAYON_NUM_THREADS": "1"}
            with open(folder / "output.log", "ab") as log:
                with self.lock:
                    if self.leaving:
                        return None
                    child = subprocess.Popen(
                        [str(self.program.path), *arguments, "--out", str(folder)],
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                        env=environment,
                        start_new_session=True,
                    )
                    self.children.add(child)
                child.wait()
                with self.lock:
                    self.children.remove(child)
        points = curve(folder)
        if not is_done(points, job):
            return None
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return {
            "arm": job.arm,
            "seed": job.seed,
            "digest": job.digest,
            "settings": job.settings,
            "program": self.program.version,
            "program_digest": self.program.digest,
            "machine": machine(),
            "load": round(max(load, os.getloadavg()[0]), 1),
            "jobs": self.jobs,
            "ended": time.strftime("%Y-%m-%d"),
            "evaluations": points,
        }
