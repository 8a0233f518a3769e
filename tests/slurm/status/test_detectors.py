"""Each detector finds its fault, and nothing in a run that is as it should be."""

from dataclasses import replace
from typing import Any

import pytest

from ditmoe.slurm.client import Unseen
from ditmoe.slurm.heartbeats import Heartbeat, Terms
from ditmoe.slurm.status.detectors import DETECTORS, findings, health
from ditmoe.slurm.status.snapshot import Owner, Recorded, Saved, Snapshot
from ditmoe.slurm.status.standing import standing
from tests.slurm.status.facts import NOW, attempt, healthy, job, local, record, state

BLIND = Unseen("squeue: Unable to contact slurm controller")


def heartbeat(rank: int, phase: Any = "step", beats: int = 100, since: float = 5) -> Heartbeat:
    return Heartbeat(rank, 2, f"n{rank + 1}", 1, 1, phase, 200, "", beats, NOW - since, NOW - 5)


def recorded(*speeds: float, loss: float | None = 1.0, skipped: bool = False) -> tuple[Recorded, ...]:
    return tuple(Recorded(20 * n, loss, speed, skipped) for n, speed in enumerate(speeds, 1))


SLOWER = recorded(*[4.0] * 9, 2.0, 2.0, 2.0)
FRUITLESS = record(attempt(1, "failed", 0, 50), attempt(2, "hung", 50, 50), attempt(3, "failed", 50, 50))
LONG = record(attempt(1, age=20_000))
SHORT_SAVE = Terms(1, {**Terms().limits, "save": 60})
SICK = [
    # Written 10,000 s ago, where 600 s and three records of 40 s are allowed.
    (
        "stalled",
        healthy(state=state(age=10_000), record=LONG),
        "problem",
        "written nothing for 2 h 46 min; expected a sign",
    ),
    ("stalled", local(state=state(age=721, job=None)), "problem", "within 12 min"),
    ("stalled", healthy(state=None, record=record(attempt(1, age=2000))), "problem", "within 30 min"),
    (
        "stalled",
        healthy(heartbeats=(heartbeat(0, beats=101, since=700), heartbeat(1, since=700))),
        "problem",
        "no progress of rank 1 (n2) in `step` for 11 min 40 s; expected some within 10 min",
    ),
    ("stalled", healthy(heartbeats=(heartbeat(0, "save", since=61),), terms=SHORT_SAVE), "problem", "in `save`"),
    (
        "checkpoint-late",
        healthy(saved=Saved(50, NOW - 60, 1)),
        "problem",
        "that of step 50, 1 min old; the run is at",
    ),
    (
        "checkpoint-late",
        healthy(saved=Saved(199, NOW - 900, 1), record=LONG),
        "problem",
        "every 50 steps, which take 1 min 40 s",
    ),
    ("checkpoint-late", healthy(saved=None), "problem", "there is no checkpoint; the run is at step 200"),
    ("slower", healthy(recorded=SLOWER), "warning", "2.0 images/s lately, 4.0 before"),
    (
        "no-progress",
        healthy(record=FRUITLESS),
        "problem",
        "the last 2 attempts brought no new checkpoint; the last",
    ),
    ("loss-not-finite", healthy(recorded=recorded(4.0, loss=None)), "problem", "at step 20 is no finite number"),
    ("disk-full", healthy(free_bytes=2**29), "problem", "the run's disk has 512.0 MiB free"),
    ("disk-full", healthy(saved=Saved(200, NOW, 2**40)), "problem", "a checkpoint has 1.0 TiB"),
    (
        "never-starts",
        healthy(queue={"7": job("PENDING", "JobHeldUser")}),
        "problem",
        "Slurm's reason is JobHeldUser",
    ),
    ("cut-off", healthy(queue={"7": job("NODE_FAIL")}), "problem", "job 7 has ended: NODE_FAIL"),
    ("unknown", healthy(state=state(age=10_000), queue=BLIND), "warning", "Unable to contact slurm controller"),
    ("unreadable", healthy(unreadable=("runs/a/lock: Permission denied",)), "warning", "Permission denied"),
    ("unreadable", healthy(record=replace(record(attempt(1)), damaged=(3,))), "warning", "damaged lines"),
    ("queue-unseen", healthy(queue=BLIND), "note", "the queue was not seen: squeue: Unable"),
    ("time-limit", healthy(queue={"7": job(ends=NOW + 90)}), "note", "is up 5 min before the end"),
]


@pytest.mark.parametrize(("kind", "snapshot", "severity", "text"), SICK)
def test_a_fault_is_found(kind: str, snapshot: Snapshot, severity: str, text: str) -> None:
    (found,) = (finding for finding in findings(snapshot) if finding.kind == kind)
    assert found.severity == severity and text in found.text


def test_every_detector_is_tested() -> None:
    snapshots = [snapshot for _, snapshot, _, _ in SICK]
    firing = {detect.__name__ for made in snapshots for detect in DETECTORS if detect(made, standing(made))}
    assert firing == {detect.__name__ for detect in DETECTORS}


@pytest.mark.parametrize(
    "snapshot",
    [
        healthy(),
        local(),
        healthy(state=state(age=700)),
        healthy(state=None, saved=None, recorded=()),
        healthy(heartbeats=(heartbeat(0, beats=101, since=5000), heartbeat(1, since=500))),
        healthy(heartbeats=(heartbeat(0, "ended", since=5000),)),
        # Long evaluations write no state; the ranks themselves say that they get on.
        healthy(heartbeats=(heartbeat(0, "evaluation", since=3000),), state=state(age=3000), record=LONG),
        healthy(recorded=recorded(*[4.0] * 9, 3.0, 3.0, 3.0)),
        healthy(recorded=recorded(4.0, 4.0, 1.0)),
        healthy(recorded=recorded(4.0, loss=None, skipped=True)),
        healthy(record=record(attempt(1, "stopped", 0, 50), attempt(2, "failed", 50, 50), attempt(3))),
        healthy(state=state("complete"), record=record(attempt(1, "failed"), attempt(2, "failed"))),
        healthy(saved=Saved(150, NOW - 110, 1)),
        healthy(queue={"7": job(ends=NOW + 1000)}),
        # An attempt has just begun, and takes its time to start.
        healthy(state=state(age=5000), record=record(attempt(1, "stopped", 0, 200, age=6000), attempt(2))),
    ],
)
def test_a_run_as_it_should_be_has_no_fault(snapshot: Snapshot) -> None:
    assert findings(snapshot) == []
    assert health(standing(snapshot), []) == "healthy"


@pytest.mark.parametrize("reason", ["Priority", "Resources", "Dependency", "BeginTime", "QOSMaxJobsPerUserLimit"])
def test_a_job_that_waits_its_turn_is_no_fault(reason: str) -> None:
    snapshot = healthy(queue={"7": job("PENDING", reason)})
    assert findings(snapshot) == [] and health(standing(snapshot), []) == "waiting"


@pytest.mark.parametrize(
    ("snapshot", "expected"),
    [
        (healthy(free_bytes=0, recorded=SLOWER), "problem"),
        (healthy(recorded=SLOWER), "warning"),
        (healthy(queue=BLIND), "healthy"),
        (healthy(state=state(age=10_000), queue=BLIND, free_bytes=0), "unknown"),
        (healthy(state=state("failed"), queue={}), "problem"),
        (healthy(state=state("stopped"), queue={}), "ended"),
        (local(owner=Owner(1, "here", False)), "problem"),
    ],
)
def test_health_is_the_worst_that_is_found(snapshot: Snapshot, expected: str) -> None:
    found = findings(snapshot)
    assert health(standing(snapshot), found) == expected
    order = [("problem", "warning", "note").index(finding.severity) for finding in found]
    assert order == sorted(order)
