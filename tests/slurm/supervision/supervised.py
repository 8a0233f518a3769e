"""A tiny training run as a job of the virtual cluster, under the supervisor, and what its files say."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditmoe.parallel.checkpoint.folder import newest_checkpoint, read_weights, step_of
from ditmoe.slurm.attempts import Record, read_attempts
from ditmoe.slurm.job_folder import PHASES, Job, training_folder
from tests.forked import DITMOE
from tests.slurm.cluster import Cluster

CONFIG = """
run: {{dir: {run}}}
launch: {{processes: {processes}, device: cpu, threads: 1}}
model: {{depth: 2, hidden: 32, heads: 4, patch: 2, experts: 4, experts_per_token: 2}}
data: {{sources: [{{path: {shards}}}], workers: 1, flip: true}}
parallel: {{expert: 2, zero: 1}}
train: {{steps: {steps}, batch: 16, precision: fp32, log_every: 1, checkpoint_every: 5}}
optim: {{lr: 1.0e-3}}
"""
STEPS = 80
SCRIPT = """
export OMP_NUM_THREADS=1
{path}
{python} -m ditmoe.slurm.supervise {folder} &
supervisor=$!
trap 'kill -TERM $supervisor' TERM
trap 'kill -USR1 $supervisor' USR1
trap 'kill -USR2 $supervisor' USR2
while wait $supervisor; code=$?; kill -0 $supervisor 2>/dev/null; do :; done
exit $code
"""
COMPARED = ("step", "images", "loss", "balance_loss", "grad_norm", "lr", "expert_load")


def curve(run: Path) -> list[dict[str, Any]]:
    """What must be equal, of each record."""
    records = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in COMPARED} for record in records]


def weights(run: Path) -> dict[str, bytes]:
    """The bytes of the newest checkpoint's weights."""
    newest = newest_checkpoint(run)
    assert newest is not None
    return {name: tensor.numpy().tobytes() for name, tensor in read_weights(newest, "weights").items()}


@dataclass(frozen=True)
class Process:
    """A process of this machine or of a virtual node, by this machine's numbers."""

    pid: int
    parent: int
    command: tuple[str, ...]
    variables: tuple[str, ...]


def processes() -> list[Process]:
    """All that run now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "status").read_text().partition("PPid:")[2].split()[0])
            command, variables = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except (OSError, IndexError):  # it has ended
            continue
        texts = (tuple(map(os.fsdecode, entries[:-1])) for entries in (command, variables))
        found.append(Process(int(folder.name), parent, *texts))
    return found


@dataclass
class Supervised:
    """A run that trains as a job of two nodes with a task each."""

    cluster: Cluster
    run: Path
    config: Path
    job: str = ""

    def prepare(self, limits: Mapping[str, float] | None = None, check: bool = False, **changes: Any) -> None:
        """Write job.json."""
        folder = training_folder(self.run)
        folder.path.mkdir(parents=True, exist_ok=True)
        values = {
            "name": "ditmoe-test",
            "verb": "train",
            "arguments": ("train", str(self.config)),
            "run": str(self.run),
            "nodes": 2,
            "tasks_per_node": 1,
            "gpus_per_node": 0,
            "directory": str(self.run.parent),
            "python": sys.executable,
            "task": (sys.executable,),
            "srun": (),
            "limits": {**PHASES, **(limits or {})},
            "warning": 30,
            "check": check,
        }
        folder.store(Job(**{**values, **changes}))

    def submit(self, *options: str, path: str = "") -> str:
        """Hand the job to Slurm."""
        folder = training_folder(self.run).path
        self.job = self.cluster.submit(
            SCRIPT.format(python=sys.executable, folder=folder, path=path),
            *("--nodes=2", "--ntasks-per-node=1", "--requeue", "--open-mode=append", "--time=30"),
            *("--signal=B:USR2@30", f"--output={folder}/output.txt", "--job-name=ditmoe-test", *options),
        )
        return self.job

    def submit_as_a_user(self, *options: str) -> str:
        """Hand the job in by `ditmoe submit`: its script and a copy of the program lie in the job folder."""
        command = [sys.executable, *DITMOE, "submit", "train", str(self.config), "--nodes=2", *options]
        done = subprocess.run(
            command, env=self.cluster.environment, cwd=self.run.parent, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        self.job = self.record.submissions[-1].job
        return self.job

    def status(self) -> str:
        """What `ditmoe status` shows of the run."""
        command = [sys.executable, *DITMOE, "status", str(self.run)]
        done = subprocess.run(command, env=self.cluster.environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def of_rank(self, rank: int) -> list[int]:
        """A rank's process, and then those below it; none where it does not run."""
        place = str(self.run.parent)
        tasks = {
            process.pid: process
            for process in processes()
            if f"SLURM_PROCID={rank}" in process.variables
            and "ditmoe.launcher" in process.command
            and process.command[0] != "srun"
            and any(word.startswith(place) for word in process.command)
        }
        return sorted(tasks, key=lambda pid: tasks[pid].parent in tasks)

    def of_supervisor(self) -> tuple[int, int] | None:
        """The supervisor's process and that of the batch script, its parent; None where it does not run."""
        folder = str(training_folder(self.run).path)
        found = [each for each in processes() if {"ditmoe.slurm.supervise", folder} <= {*each.command}]
        return (found[0].pid, found[0].parent) if found else None

    @property
    def record(self) -> Record:
        return read_attempts(training_folder(self.run).path)

    @property
    def output(self) -> str:
        """What the job printed so far."""
        files = sorted(training_folder(self.run).path.glob("output*.txt"))
        return "".join(file.read_text(errors="replace") for file in files)

    @property
    def steps(self) -> int:
        """Steps on record."""
        file = self.run / "stats.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        self.cluster.wait(condition, lambda: f"{what}; the job printed:\n{self.output[-6000:]}", seconds)

    def wait_for_training(self, attempt: int, more: int = 6, saved: bool = True) -> None:
        """Wait until an attempt has trained some steps, and if `saved` until a checkpoint of them is whole: one is
        written while the run goes on."""
        self.wait(lambda: len(self.record.attempts) >= attempt, f"attempt {attempt}")
        started = time.time()
        state = self.run / "state.json"

        def trains() -> bool:
            if not state.exists() or state.stat().st_mtime < started:
                return False
            told = json.loads(state.read_text())
            begun = self.record.attempts[attempt - 1].step or 0
            newest = newest_checkpoint(self.run)
            is_saved = newest is not None and step_of(newest) > begun
            return told["state"] == "training" and told["step"] >= begun + more and (is_saved or not saved)

        self.wait(trains, f"attempt {attempt} to train")

    def wait_for_end(self, attempt: int) -> None:
        """Wait until an attempt's end is on record."""
        self.wait(
            lambda: len(self.record.attempts) >= attempt and self.record.attempts[attempt - 1].end is not None,
            f"the end of attempt {attempt}",
        )
