"""What follows when an attempt ends: pure rules over what was seen of it and the attempts before it.

Requeue only with a reason. A user's error is never tried again, and neither is a job that the user cancelled.
After `MOST_WITHOUT_PROGRESS` attempts in a row that brought no new checkpoint the job stops, whatever ended them;
an attempt whose end nobody saw counts too.
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ditmoe.data.storage.stopping import EXIT_STOPPED
from ditmoe.model.outside.text import counted
from ditmoe.slurm.attempts import Attempt, Decision, End, Outcome, Record

EXIT_USER_ERROR: Final = 2
EXIT_NO_PROGRESS: Final = 69
"""EX_UNAVAILABLE of sysexits.h: nothing is wrong with the command, and to repeat it now brings nothing."""
MOST_WITHOUT_PROGRESS: Final = 3
"""Attempts in a row."""
SUSPICIOUS_SECONDS: Final = 600.0
"""An attempt that failed sooner, and saved nothing, may have failed for its hosts: those that it blames are left
out of the next one. A broken node is empty, and so the queue would hand it out at once again."""

_STOP_CODES: Final = frozenset(
    128 + number
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
)
"""Exit codes of a program that a request to stop has ended."""


@dataclass(frozen=True)
class Silence:
    """Ranks of which there was no sign of life within their limit."""

    reason: str
    """Which, on which hosts, in which phase and for how long."""
    hosts: tuple[str, ...]
    """That are to blame; none where all ranks wait for one another."""


@dataclass(frozen=True)
class Seen:
    """What was seen of an attempt that has ended."""

    exit_code: int | None
    """Of the program, 128 + N where signal N ended it; None: it never started, or was killed for its silence."""
    seconds: float
    """That the attempt took."""
    step: int | None
    """Of the newest complete checkpoint; of jobs that train nothing, the number of files they have made; None: the
    folder could not be read."""
    state: str | None = None
    """What RUN/state.json says: complete, stopped, failed, …, or unknown where it cannot be read; None: the job
    trains nothing, and is complete when its program ends well."""
    state_reason: str = ""
    asked: str | None = None
    """Name of the first signal that asked the supervisor for an end, such as SIGUSR2."""
    cancelled: bool = False
    """Whether the user cancelled the job, by `ditmoe cancel` or by scancel."""
    silence: Silence | None = None
    failed_nodes: Mapping[str, str] = field(default_factory=dict)
    """Host → what its check found."""
    check_failed: str | None = None
    """What kept the check from running, or from passing, where it names no host."""
    blamed: tuple[str, ...] = ()
    """Hosts of the processes that failed first, as srun says."""
    words: str = ""
    """The last that srun said of it."""


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended, and what follows."""

    outcome: Outcome
    reason: str
    decision: Decision
    exit_code: int
    """Of the batch job."""
    suspects: tuple[str, ...] = ()
    """Hosts that the next attempt should not get."""


def verdict(
    seen: Seen, attempt: Attempt, before: Sequence[Attempt], most_without_progress: int = MOST_WITHOUT_PROGRESS
) -> Verdict:
    """How an attempt ended, and what follows.

    Args:
        seen: what was seen of it.
        attempt: the attempt, as it started.
        before: the attempts before it, as far as they count for it (`Record.since`).
        most_without_progress: attempts in a row.
    """
    outcome, reason = _outcome(seen)
    if outcome == "complete":
        return Verdict(outcome, reason, "done", 0)
    if outcome == "user-error":
        return Verdict(outcome, reason, "stop", EXIT_USER_ERROR)
    if outcome == "cancelled":
        return Verdict(outcome, reason, "stop", seen.exit_code or EXIT_STOPPED)
    suspects = _suspects(seen, outcome, attempt)
    vain = 0 if progressed(attempt.step, seen.step) else 1 + without_progress(before)
    if vain >= most_without_progress:
        return Verdict("no-progress", _in_vain(vain, reason, seen.step), "stop", EXIT_NO_PROGRESS, suspects)
    return Verdict(outcome, reason, "requeue", seen.exit_code or 0, suspects)


def _outcome(seen: Seen) -> tuple[Outcome, str]:
    """What ended an attempt, and one sentence of it."""
    if seen.exit_code == EXIT_USER_ERROR:
        told = seen.state_reason or "the output of the job has its message, if srun passed one on"
        return "user-error", f"the program refused its input (exit code {EXIT_USER_ERROR}): {told}"
    if seen.exit_code == 0 and seen.state in (None, "complete"):
        return "complete", "the program completed its work"
    if seen.cancelled:
        return "cancelled", "the user cancelled the job"
    if seen.failed_nodes:
        found = "; ".join(f"{host}: {problem}" for host, problem in sorted(seen.failed_nodes.items()))
        return "node-check", f"the check before the start failed: {found}"
    if seen.check_failed is not None:
        return "node-check", f"the check before the start failed on no one host: {seen.check_failed}"
    if seen.silence is not None:
        return "hung", seen.silence.reason
    well = seen.exit_code in (0, EXIT_STOPPED)
    if well or (seen.state == "stopped" and seen.exit_code in _STOP_CODES):
        told = seen.state_reason or f"the program stopped early (state {seen.state})"
        passed_on = seen.asked is not None and seen.asked not in told
        return "stopped", f"{seen.asked} came: {told}" if passed_on else told
    if seen.asked is not None:
        return (
            "stopped",
            f"{seen.asked} came, and the program ended without a checkpoint ({_code(seen.exit_code)})",
        )
    if seen.exit_code in _STOP_CODES:
        return "stopped", f"a signal ended the program before it could save ({_code(seen.exit_code)})"
    words = f": {seen.words}" if seen.words else ""
    return "failed", f"the program failed ({_code(seen.exit_code)}){words}"


def _code(code: int | None) -> str:
    if code is None:
        return "exit code unknown"
    if code > 128 and code - 128 in {int(number) for number in signal.Signals}:
        return f"{signal.Signals(code - 128).name}"
    return f"exit code {code}"


def _suspects(seen: Seen, outcome: Outcome, attempt: Attempt) -> tuple[str, ...]:
    """The hosts that the next attempt should not get, of those that this one had.

    A host that failed its check always; the host of a silent rank or of the first failure only where the attempt
    brought nothing within minutes, and never all of several hosts: they share what is to blame.
    """
    if outcome == "node-check":
        named: Sequence[str] = tuple(seen.failed_nodes)
    elif progressed(attempt.step, seen.step) or seen.seconds > SUSPICIOUS_SECONDS:
        return ()
    elif outcome == "hung" and seen.silence is not None:
        named = seen.silence.hosts
    elif outcome == "failed":
        named = seen.blamed
    else:
        return ()
    hosts = tuple(host for host in attempt.hosts if host in named)
    return () if len(hosts) == len(attempt.hosts) > 1 and outcome != "node-check" else hosts


def excludable(
    suspects: Sequence[str], excluded: Sequence[str], there: Sequence[str] | None, nodes: int
) -> tuple[str, ...]:
    """The hosts that a job may be kept from: those before, and as many suspects as leave it enough others.

    Args:
        suspects: the ones to blame first.
        excluded: that it is kept from already.
        there: all hosts that it could have; None: not known.
        nodes: that the job needs.
    """
    chosen = list(dict.fromkeys(excluded))
    for host in suspects:
        left = None if there is None else [other for other in there if other not in {*chosen, host}]
        if host not in chosen and (left is None or len(left) >= nodes):
            chosen.append(host)
    return tuple(chosen)


def progressed(before: int | None, after: int | None) -> bool:
    """Whether an attempt brought a newer checkpoint. What cannot be read has brought none."""
    return after is not None and after > (before or 0)


def without_progress(attempts: Sequence[Attempt]) -> int:
    """How many attempts, counted back from the last, brought nothing."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.end is not None and progressed(attempt.step, attempt.end.step):
            break
        count += 1
    return count


def _in_vain(count: int, reason: str, step: int | None) -> str:
    where = "an unknown step" if step is None else f"step {step}"
    return (
        f"{counted(count, 'attempt')} in a row brought no new checkpoint after {where}; the last: {reason}. "
        f"Find the reason,"
        " then submit the job anew"
    )


@dataclass(frozen=True)
class Opening:
    """What comes before an attempt may start."""

    closed: tuple[tuple[int, End], ...]
    """Attempts by number that were cut off, and how they are closed."""
    refusal: Verdict | None
    """Why there is to be no attempt; None: it may start."""


def opening(
    record: Record, job: str, step: int | None, now: float, most_without_progress: int = MOST_WITHOUT_PROGRESS
) -> Opening:
    """What comes before the next attempt of a job: cut-off attempts are closed, and there may have been enough.

    Args:
        record: all that is on record; no other attempt runs.
        job: the job that is to start.
        step: of the newest complete checkpoint.
        now: seconds since 1970.
        most_without_progress: attempts in a row.
    """
    since = record.since(job)
    ends: dict[int, End] = {}
    for attempt in record.attempts:
        if attempt.end is None:
            # What is there now was there when the next attempt started, if one did.
            later = [other.step for other in record.attempts if other.number > attempt.number]
            reached = later[0] if later else step
            reason = "nobody saw its end: its node died, or the batch script was killed"
            ends[attempt.number] = End("cut-off", reason, None, reached, attempt.hosts, (), (), "requeue", now)
    closed = tuple(ends.items())
    decided = [attempt.end for attempt in since if attempt.end is not None and attempt.end.decision != "requeue"]
    if job in record.cancelled:
        return Opening(closed, Verdict("cancelled", "the user cancelled the job", "stop", EXIT_STOPPED))
    if decided:
        last = decided[-1]
        code = {
            "done": 0,
            "user-error": EXIT_USER_ERROR,
            "no-progress": EXIT_NO_PROGRESS,
            "cancelled": EXIT_STOPPED,
        }
        exit_code = 0 if last.decision == "done" else code.get(last.outcome, last.exit_code or 1)
        return Opening(closed, Verdict(last.outcome, last.reason, last.decision, exit_code))
    before = [replace(attempt, end=attempt.end or ends[attempt.number]) for attempt in since]
    vain = without_progress(before)
    if vain >= most_without_progress:
        last_end = before[-1].end
        assert last_end is not None
        reason = _in_vain(vain, last_end.reason, step)
        return Opening(closed, Verdict("no-progress", reason, "stop", EXIT_NO_PROGRESS))
    return Opening(closed, None)
