"""Snapshots of made-up runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ditmoe.slurm.attempts import Attempt, End, Outcome, Record, Submission
from ditmoe.slurm.client import QueuedJob
from ditmoe.slurm.status.snapshot import Owner, Recorded, Saved, Snapshot, State

NOW = 1_000_000.0
HOSTS = ("n1", "n2")


def job(state: str = "RUNNING", reason: str = "", number: str = "7", ends: float | None = None) -> QueuedJob:
    return QueuedJob(number, state, reason, HOSTS if state == "RUNNING" else (), NOW - 900, NOW - 800, ends)


def state(word: str = "training", age: float = 10, **values: Any) -> State:
    """Half of 400 steps of 8 images, at 4 images/s: a step takes 2 s."""
    made = State(word, NOW - age, 200, 400, 1600, 4.0, "", "n1", "7")
    return replace(made, **values)


def attempt(
    number: int, outcome: Outcome | None = None, before: int = 0, after: int = 0, age: float = 800
) -> Attempt:
    end = None
    if outcome is not None:
        decision = "done" if outcome == "complete" else "requeue"
        reason = f"reason of {number}"
        end = End(outcome, reason, 1, after, HOSTS, (), (), decision, NOW - age + 100)  # type: ignore[arg-type]
    return Attempt(number, "7", number - 1, HOSTS, before, NOW - age, end)


def record(*attempts: Attempt) -> Record:
    return Record((Submission("7", NOW - 900),), attempts)


def healthy(**changes: Any) -> Snapshot:
    """A run that job 7 trains, as it should be."""
    made = Snapshot(
        run=Path("runs/a"),
        now=NOW,
        state=state(),
        saved=Saved(200, NOW - 60, 2**20),
        recorded=tuple(Recorded(step, 1.0, 4.0, False) for step in range(20, 201, 20)),
        steps=400,
        log_every=20,
        checkpoint_every=50,
        owner=Owner(12, "n1", None),
        record=record(attempt(1)),
        queue={"7": job()},
        free_bytes=2**40,
    )
    return replace(made, **changes)


def local(**changes: Any) -> Snapshot:
    """A run that a process of this machine trains."""
    values: dict[str, Any] = {
        "state": state(job=None, host="here"),
        "owner": Owner(12, "here", True),
        "record": Record(),
        "queue": None,
    }
    return healthy(**{**values, **changes})
