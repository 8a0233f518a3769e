"""The rules of requeueing, over every kind of end and history."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe.data.storage.stopping import EXIT_STOPPED
from ditmoe.slurm.attempts import Attempt, End, Record
from ditmoe.slurm.requeue import (
    EXIT_NO_PROGRESS,
    SUSPICIOUS_SECONDS,
    Seen,
    Silence,
    opening,
    verdict,
    without_progress,
)

HOSTS = ("n1", "n2", "n3")

steps = st.none() | st.integers(0, 5)
hosts = st.lists(st.sampled_from(HOSTS), unique=True).map(tuple)
seen_of = st.builds(
    Seen,
    exit_code=st.none() | st.sampled_from([0, 1, 2, 69, 75, 128 + 9, 128 + 10, 128 + 15, 255]),
    seconds=st.floats(0, 10_000),
    step=steps,
    state=st.none() | st.sampled_from(["starting", "training", "complete", "stopped", "failed", "unknown"]),
    state_reason=st.sampled_from(["", "stopped by SIGTERM at step 3"]),
    asked=st.none() | st.sampled_from(["SIGTERM", "SIGUSR2"]),
    cancelled=st.booleans(),
    silence=st.none() | st.builds(Silence, reason=st.just("rank 1 on n2 is silent"), hosts=hosts),
    failed_nodes=st.dictionaries(st.sampled_from(HOSTS), st.just("no GPU"), max_size=2),
    check_failed=st.none() | st.just("srun did not start"),
    blamed=hosts,
)


def attempt(number: int = 1, step: int | None = 0, end: End | None = None, job: str = "7") -> Attempt:
    return Attempt(number, job, number - 1, HOSTS, step, 0.0, end)


def ended(number: int, step: int | None, reached: int | None, job: str = "7") -> Attempt:
    return attempt(number, step, End("failed", "it broke", 1, reached, HOSTS, (), (), "requeue", 1.0), job)


histories = st.lists(st.tuples(steps, steps), max_size=6).map(
    lambda pairs: [ended(number, *pair) for number, pair in enumerate(pairs, 1)]
)


@given(seen=seen_of, before=histories, start=steps)
def test_a_users_error_is_never_requeued(seen: Seen, before: list[Attempt], start: int | None) -> None:
    found = verdict(replace(seen, exit_code=2), attempt(9, start), before)
    assert (found.outcome, found.decision, found.exit_code) == ("user-error", "stop", 2)


@given(seen=seen_of, before=histories, start=steps)
def test_what_the_user_cancelled_is_never_requeued(seen: Seen, before: list[Attempt], start: int | None) -> None:
    assert verdict(replace(seen, cancelled=True), attempt(9, start), before).decision != "requeue"


@given(ends=st.lists(seen_of, min_size=3, max_size=12))
def test_never_more_than_three_attempts_without_progress(ends: list[Seen]) -> None:
    """Whatever ends them, one after the other as the supervisor plays them."""
    done: list[Attempt] = []
    for number, seen in enumerate(ends, 1):
        record = Record(attempts=tuple(done), started_before={"7": 0})
        if opening(record, "7", done[-1].end.step if done and done[-1].end else 0, 0.0).refusal is not None:
            break
        started = attempt(number, done[-1].end.step if done and done[-1].end else 0)
        found = verdict(seen, started, done)
        if found.outcome == "no-progress":
            assert (found.exit_code, found.decision) == (EXIT_NO_PROGRESS, "stop")
        end = End(found.outcome, found.reason, seen.exit_code, seen.step, HOSTS, (), (), found.decision, 0.0)
        done.append(replace(started, end=end))
        if found.decision != "requeue":
            break
    assert without_progress(done) <= 3
    assert all(attempt.end is not None and attempt.end.decision == "requeue" for attempt in done[:-1])


@given(cut=st.lists(st.booleans(), min_size=1, max_size=6), job=st.sampled_from(["7", "8"]))
def test_a_cut_off_attempt_counts(cut: list[bool], job: str) -> None:
    """Attempts that bring nothing stop the job after three, whether their ends were seen or not; a chain too."""
    attempts = [attempt(n) if lost else ended(n, 0, 0) for n, lost in enumerate(cut, 1)]
    found = opening(Record(attempts=tuple(attempts), started_before={"7": 0, "8": 0}), job, 0, 5.0)
    assert [number for number, _ in found.closed] == [n for n, lost in enumerate(cut, 1) if lost]
    assert all(end.outcome == "cut-off" and end.step == 0 and end.time == 5.0 for _, end in found.closed)
    assert (found.refusal is not None) == (len(cut) >= 3)
    if found.refusal is not None:
        assert found.refusal.exit_code == EXIT_NO_PROGRESS and found.refusal.decision == "stop"
        assert "attempts in a row" in found.refusal.reason


def test_a_cut_off_attempt_that_saved_is_progress() -> None:
    found = opening(Record(attempts=(attempt(1), attempt(2), attempt(3)), started_before={"7": 0}), "7", 30, 1.0)
    assert [end.step for _, end in found.closed] == [0, 0, 30]
    assert found.refusal is None


@given(seen=seen_of, before=histories, start=steps)
def test_suspects(seen: Seen, before: list[Attempt], start: int | None) -> None:
    """Hosts of this attempt alone, with a reason of their own, and not all of several for what they share."""
    found = verdict(seen, attempt(9, start), before)
    assert set(found.suspects) <= set(HOSTS)
    if found.outcome in ("complete", "stopped", "user-error", "cancelled"):
        assert not found.suspects
    if found.suspects and not seen.failed_nodes:
        assert seen.seconds <= SUSPICIOUS_SECONDS and len(found.suspects) < len(HOSTS)
        assert seen.step is None or seen.step <= (start or 0)


@pytest.mark.parametrize(
    ("seen", "outcome", "decision", "suspects"),
    [
        (Seen(0, 9, 12, "complete"), "complete", "done", ()),
        (Seen(0, 9, 4), "complete", "done", ()),
        (Seen(0, 9, 4, "stopped", "stopped by SIGUSR2 at step 4"), "stopped", "requeue", ()),
        (Seen(0, 9, 4, "unknown"), "stopped", "requeue", ()),
        (Seen(EXIT_STOPPED, 9, 4, "stopped", "stopped by SIGUSR2 at step 4"), "stopped", "requeue", ()),
        (Seen(EXIT_STOPPED, 9, 4, "stopped", cancelled=True), "cancelled", "stop", ()),
        (Seen(128 + 15, 9, 4, "stopped", "stopped by SIGTERM at step 4", "SIGUSR2"), "stopped", "requeue", ()),
        (Seen(128 + 15, 9, 0, "training", asked="SIGTERM"), "stopped", "requeue", ()),
        (Seen(128 + 10, 9, 0, "starting", blamed=("n1",)), "stopped", "requeue", ()),
        (Seen(1, 9, 0, "failed", blamed=("n2",)), "failed", "requeue", ("n2",)),
        (Seen(1, 9, 4, "failed", blamed=("n2",)), "failed", "requeue", ()),
        (Seen(1, 9999, 0, "failed", blamed=("n2",)), "failed", "requeue", ()),
        (Seen(1, 9, 0, "failed", blamed=HOSTS), "failed", "requeue", ()),
        (Seen(None, 9, 0, silence=Silence("silent", ("n3",))), "hung", "requeue", ("n3",)),
        (Seen(None, 9, 0, failed_nodes={"n1": "no GPU"}), "node-check", "requeue", ("n1",)),
        (Seen(None, 9, 0, failed_nodes=dict.fromkeys(HOSTS, "no GPU")), "node-check", "requeue", HOSTS),
        (Seen(1, 9, 0, check_failed="all-reduce"), "node-check", "requeue", ()),
        (Seen(0, 9, 4, "stopped", cancelled=True), "cancelled", "stop", ()),
    ],
)
def test_each_end(seen: Seen, outcome: str, decision: str, suspects: tuple[str, ...]) -> None:
    found = verdict(seen, attempt(), [])
    assert (found.outcome, found.decision, found.suspects) == (outcome, decision, suspects)
    assert found.reason
    if decision == "stop":
        assert found.exit_code, "what waits for the end by afterok would start"


def test_the_reason_names_the_signal_that_really_came() -> None:
    """The tasks are asked by another one than Slurm sent."""
    seen = Seen(EXIT_STOPPED, 9, 4, "stopped", "stopped by SIGUSR2 at step 4", asked="SIGTERM")
    assert verdict(seen, attempt(), []).reason == "SIGTERM came: stopped by SIGUSR2 at step 4"
    assert verdict(replace(seen, asked="SIGUSR2"), attempt(), []).reason == "stopped by SIGUSR2 at step 4"


def test_a_job_that_was_stopped_stays_so_and_a_new_submission_starts_anew() -> None:
    stopped = attempt(1, end=End("user-error", "no such file", 2, 0, HOSTS, (), (), "stop", 1.0))
    record = Record(attempts=(stopped,), started_before={"7": 0, "8": 0})
    of_chain = opening(record, "8", 0, 2.0).refusal
    assert of_chain is not None and of_chain.exit_code == 2 and of_chain.reason == "no such file"
    assert opening(record, "9", 0, 2.0).refusal is None, "somebody submitted it again by hand"
    cancelled = opening(Record(started_before={"7": 0}, cancelled=frozenset({"7"})), "7", 0, 1.0).refusal
    assert cancelled is not None and cancelled.outcome == "cancelled"


def test_attempts_before_the_submission_do_not_count() -> None:
    old = [ended(number, 0, 0) for number in (1, 2)]
    record = Record(attempts=tuple(old), started_before={"7": 0, "9": 2})
    assert verdict(Seen(1, 9, 0, "failed"), attempt(3, job="7"), record.since("7")).decision == "stop"
    assert verdict(Seen(1, 9, 0, "failed"), attempt(3, job="9"), record.since("9")).decision == "requeue"
