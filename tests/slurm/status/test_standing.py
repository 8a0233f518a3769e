"""Where a run stands: its own word is believed only where something of it is seen."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe.slurm.attempts import Record
from ditmoe.slurm.client import Unseen
from ditmoe.slurm.status.detectors import findings, health
from ditmoe.slurm.status.snapshot import Owner, Snapshot
from ditmoe.slurm.status.standing import standing
from tests.slurm.status.facts import NOW, attempt, healthy, job, local, record, state

BLIND = Unseen("squeue cannot be run: No such file or directory")
OLD = state(age=5000)


@pytest.mark.parametrize(
    ("snapshot", "word", "reason"),
    [
        (healthy(), "training", ""),
        (healthy(state=state("starting")), "starting", ""),
        (healthy(state=None), "starting", ""),
        (healthy(queue={"7": job("PENDING", "Priority")}), "pending", "Priority"),
        (healthy(state=state("stopped"), queue={"7": job("PENDING", "BeginTime")}), "pending", "BeginTime"),
        (healthy(state=state("stopped")), "starting", ""),
        (healthy(state=state("stopped", reason="SIGTERM"), queue={}, record=record()), "stopped", "SIGTERM"),
        (healthy(state=state("failed", reason="disk full"), queue={}), "failed", "disk full"),
        (healthy(state=state("complete"), queue={}), "complete", ""),
        (healthy(state=state("complete"), queue=BLIND), "complete", ""),
        (healthy(queue={"7": job("NODE_FAIL")}), "cut off", "job 7 has ended: NODE_FAIL"),
        (healthy(state=OLD, queue={}), "cut off", "the queue does not have job 7 any more"),
        (healthy(queue={"7": job("FAILED")}, record=record(attempt(1, "hung"))), "failed", "reason of 1"),
        (healthy(state=None, queue={}, record=record(attempt(1, "no-progress"))), "failed", "reason of 1"),
        # What was written before the attempt that runs is not of it.
        (healthy(state=OLD, record=record(attempt(1, "cut-off", age=4000), attempt(2))), "starting", ""),
        # The queue of another cluster, or one that does not answer.
        (healthy(queue={}), "unknown", "its files are fresh, but the queue here does not have job 7"),
        (healthy(queue=BLIND, accounts=BLIND), "training", ""),
        (healthy(state=OLD, queue=BLIND), "unknown", BLIND.reason),
        (healthy(state=OLD, queue=BLIND, accounts={"7": job("TIMEOUT")}), "cut off", "job 7 has ended: TIMEOUT"),
        (healthy(state=OLD, queue=BLIND, accounts={"7": job("RUNNING")}), "starting", ""),
        (healthy(state=None, queue=BLIND, accounts=BLIND), "unknown", f"{BLIND.reason}; {BLIND.reason}"),
        # Taken out of the queue before it began, by `ditmoe cancel` or scancel; or while it ran, without a word.
        (
            healthy(state=None, record=record(), queue={"7": job("CANCELLED")}),
            "stopped",
            "job 7 has ended: CANCELLED",
        ),
        (healthy(state=OLD, queue={"7": job("CANCELLED")}), "cut off", "job 7 has ended: CANCELLED"),
        # No job of Slurm.
        (local(), "training", ""),
        (local(state=OLD), "training", ""),
        (local(owner=Owner(12, "here", False), state=state(age=5000, job=None)), "cut off", None),
        (local(owner=Owner(12, "here", False)), "cut off", "process 12 on this machine has ended"),
        (local(owner=Owner(12, "there", None)), "training", ""),
        (local(state=replace(OLD, job=None), owner=Owner(12, "there", None)), "unknown", None),
        (local(state=state("stopped", job=None), owner=Owner(12, "there", None)), "stopped", ""),
        (local(state=None, owner=None), "unknown", "it has not said anything"),
        (local(state=None, owner=None, saved=None, recorded=()), "not started", ""),
        # Its script may have been handed in by hand.
        (local(state=None, owner=None, saved=None, recorded=(), queue={}), "not started", ""),
        (local(state=None, owner=None, saved=None, recorded=(), queue=BLIND), "unknown", BLIND.reason),
        # A job trained it before, and now somebody trains it without one.
        (local(record=record(attempt(1, "stopped")), queue={}, owner=Owner(12, "there", None)), "training", ""),
    ],
)
def test_the_word(snapshot: Snapshot, word: str, reason: str | None) -> None:
    found = standing(snapshot)
    assert found.word == word
    assert reason is None or found.reason == reason


def test_an_old_state_of_another_host_is_unknown_and_says_why() -> None:
    reason = standing(local(state=state(age=5000, job=None), owner=Owner(1, "there", None))).reason
    assert reason == "it ran on host n1, which cannot be seen from here, and wrote nothing for 5000 s"


def test_stopped_while_the_queue_is_not_seen_does_not_say_that_nothing_follows() -> None:
    found = standing(healthy(state=state("stopped", reason="SIGUSR2"), queue=BLIND))
    assert found.word == "stopped" and "whether it is tried again is unknown" in found.reason


def test_figures_come_from_the_run_and_the_end_from_its_speed() -> None:
    found = standing(healthy())
    assert (found.step, found.steps, found.images_per_second, found.job) == (200, 400, 4.0, "7")
    assert found.ends == NOW - 10 + 200 * 2
    assert standing(healthy(state=state(images_per_second=None))).ends is None
    assert standing(healthy(queue={"7": job("PENDING")})).ends is None
    assert standing(healthy(state=None)).step == 200


@given(
    word=st.sampled_from(["starting", "training", "stopped", "failed"]),
    age=st.floats(0, 1e6),
    queue=st.sampled_from([BLIND, {}, {"7": job("TIMEOUT")}, {"7": job("PENDING", "x")}, None]),
    accounts=st.sampled_from([BLIND, {}, None, {"7": job("FAILED")}]),
    owner=st.sampled_from([None, Owner(1, "there", None), Owner(1, "here", False)]),
    is_job=st.booleans(),
)
def test_nothing_that_is_not_seen_is_healthy(
    word: str, age: float, queue: object, accounts: object, owner: Owner | None, is_job: bool
) -> None:
    """Healthy is what a process, a running job or fresh files say; without any of them nothing is."""
    own = state(word, age=age, job="7" if is_job else None)
    snapshot = healthy(state=own, queue=queue, accounts=accounts, owner=owner, record=Record())
    found = standing(snapshot)
    if health(found, findings(snapshot)) == "healthy":
        assert found.word in ("starting", "training") and word in ("starting", "training")
        assert age <= 1800 and (owner is None or owner.alive is None or is_job)
