"""What is known of runs, for a person and for a program."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ditmoe.model.outside.text import printable
from ditmoe.slurm.attempts import Attempt
from ditmoe.slurm.status.detectors import Finding, findings, health
from ditmoe.slurm.status.snapshot import OtherJob, Snapshot
from ditmoe.slurm.status.standing import Standing, standing
from ditmoe.slurm.status.words import duration

_ATTEMPTS_SHOWN = 10
_HEADER = ("run", "state", "health", "job", "step", "images/s", "saved", "attempts", "expected end")


def as_text(snapshots: Sequence[Snapshot]) -> str:
    """One run in detail, or a table of several, with what is wrong below it."""
    return detail(snapshots[0]) if len(snapshots) == 1 else table(snapshots)


def detail(snapshot: Snapshot) -> str:
    """All that is known of a run, in lines."""
    where, found = standing(snapshot), findings(snapshot)
    first = f"{printable(snapshot.run)}: {where.word}, {health(where, found)}"
    rows = [
        ("reason", where.reason),
        ("job", _job(where)),
        ("step", _step(snapshot, where)),
        ("speed", "" if where.images_per_second is None else f"{where.images_per_second:,.1f} images/s"),
        ("last saved", _saved(snapshot)),
        ("expected end", "" if where.ends is None else _moment(where.ends, snapshot.now)),
        ("attempts", str(len(snapshot.record.attempts)) if snapshot.record.attempts else ""),
    ]
    lines = [first, *(f"  {name:<13} {printable(text)}" for name, text in rows if text)]
    shown = snapshot.record.attempts[-_ATTEMPTS_SHOWN:]
    if len(shown) < len(snapshot.record.attempts):
        lines.append(f"    … {len(snapshot.record.attempts) - len(shown)} before them")
    lines += [f"    {printable(_attempt(attempt))}" for attempt in shown]
    lines += [f"  {'evaluation':<13} {printable(_other(other))}" for other in snapshot.others]
    return "\n".join([*lines, *(f"  {_finding(finding)}" for finding in found)])


def table(snapshots: Sequence[Snapshot]) -> str:
    """A line for each run, and below them a line for each finding."""
    rows, below = [_HEADER], []
    for snapshot in snapshots:
        where, found = standing(snapshot), findings(snapshot)
        saved = "-" if snapshot.saved is None else f"{snapshot.saved.step:,}, {_age(snapshot)} ago"
        speed = "-" if where.images_per_second is None else f"{where.images_per_second:,.1f}"
        end = "-" if where.ends is None else _moment(where.ends, snapshot.now)
        attempts = str(len(snapshot.record.attempts) or "-")
        name = printable(snapshot.run)
        cells = (name, where.word, health(where, found), where.job or "-", _of_steps(where) or "-")
        rows.append((*cells, speed, saved, attempts, end))
        reason = [f"{where.word}: {printable(where.reason)}"] if where.reason else []
        below += [f"{name}: {text}" for text in (*reason, *map(_finding, found))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*lines, *(["", *below] if below else [])])


def as_data(snapshot: Snapshot) -> dict[str, Any]:
    """What is known of a run, as plain data: times are seconds since 1970, null is not known."""
    where, found = standing(snapshot), findings(snapshot)
    saved, queued = snapshot.saved, where.queued
    return {
        "run": str(snapshot.run),
        "time": snapshot.now,
        "state": where.word,
        "reason": where.reason,
        "health": health(where, found),
        "job": where.job,
        "job_state": None if queued is None else queued.state,
        "job_reason": None if queued is None else queued.reason,
        "hosts": None if queued is None else list(queued.hosts),
        "job_ends": None if queued is None else queued.ends,
        "step": where.step,
        "steps": where.steps,
        "images": None if snapshot.state is None else snapshot.state.images,
        "images_per_second": where.images_per_second,
        "state_time": None if snapshot.state is None else snapshot.state.time,
        "saved": None if saved is None else {"step": saved.step, "time": saved.time, "bytes": saved.bytes},
        "expected_end": where.ends,
        "attempts": [asdict(attempt) for attempt in snapshot.record.attempts],
        "evaluations": [asdict(other) for other in snapshot.others],
        "findings": [asdict(finding) for finding in found],
    }


def _job(where: Standing) -> str:
    if where.job is None:
        return ""
    queued = where.queued
    if queued is None:
        return where.job
    hosts = f" on {', '.join(queued.hosts)}" if queued.hosts else ""
    reason = f" ({queued.reason})" if queued.reason else ""
    return f"{where.job} {queued.state}{reason}{hosts}"


def _of_steps(where: Standing) -> str:
    if where.step is None:
        return ""
    return f"{where.step:,}" + ("" if where.steps is None else f" of {where.steps:,}")


def _step(snapshot: Snapshot, where: Standing) -> str:
    text = _of_steps(where)
    if not text:
        return ""
    assert where.step is not None
    share = f" ({where.step / where.steps:.1%})" if where.steps else ""
    written = f", {duration(snapshot.now - snapshot.state.time)} ago" if snapshot.state is not None else ""
    return f"{text}{share}{written}"


def _age(snapshot: Snapshot) -> str:
    assert snapshot.saved is not None
    return duration(snapshot.now - snapshot.saved.time)


def _saved(snapshot: Snapshot) -> str:
    return "no checkpoint yet" if snapshot.saved is None else f"step {snapshot.saved.step:,}, {_age(snapshot)} ago"


def _moment(when: float, now: float) -> str:
    """`2026-03-01 14:05 (in 3 h 2 min)`, in local time."""
    return f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(when))} (in {duration(when - now)})"


def _attempt(attempt: Attempt) -> str:
    steps = "" if attempt.step is None else f", from step {attempt.step:,}"
    began = time.strftime("%m-%d %H:%M", time.localtime(attempt.time))
    text = f"{attempt.number}: job {attempt.job} on {', '.join(attempt.hosts)} since {began}{steps}"
    end = attempt.end
    if end is None:
        return text
    reached = "" if end.step is None else f" to {end.step:,}"
    excluded = f"; without {', '.join(end.excluded)} from now on" if end.excluded else ""
    return f"{text}{reached}: {end.outcome}: {end.reason} → {end.decision}{excluded}"


def _other(other: OtherJob) -> str:
    live = [job for job in other.jobs if not job.has_ended]
    if live:
        return f"{other.name}: " + ", ".join(
            f"job {job.job} {job.state}{f' ({job.reason})' if job.reason else ''}" for job in live
        )
    return f"{other.name}: {other.outcome or 'not begun, or not known'}"


def _finding(finding: Finding) -> str:
    return f"{finding.severity}: {printable(finding.text)}"
