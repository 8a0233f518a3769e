"""The table of a profile: what each part of a step takes, and how near to the machine's limits that is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Final

from ditmoe.launcher.profiling.limits import Limits
from ditmoe.launcher.profiling.parts import COMMUNICATION, PARTS, REST
from ditmoe.launcher.profiling.trace import Stretch, Trace, overlap, union
from ditmoe.launcher.profiling.work import Work
from ditmoe.model.outside.text import counted

IDLE: Final = "idle"
"""Of a GPU: the time in which it computes nothing, and no collective is on its way."""


@dataclass(frozen=True)
class PartTime:
    """What a part takes in one step, s, on the mean of the steps."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def seconds(self) -> float:
        """Both together."""
        return self.forward + self.backward


@dataclass(frozen=True)
class RankProfile:
    """What was seen on one rank; times are means of the steps, s."""

    rank: int
    steps: int
    step_seconds: float
    parts: Mapping[str, PartTime]
    """They sum to the step."""
    sending_seconds: float
    """In which at least one collective is on its way."""
    hidden_seconds: float
    """The part of these in which something is computed meanwhile."""
    limits: Limits
    work: Work
    sent: Mapping[str, int]
    """Kind of collective → bytes of one step."""
    planned: Mapping[str, int]
    """The same, as the planner has it."""

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "rank": self.rank,
            "steps": self.steps,
            "step_seconds": self.step_seconds,
            "parts": {
                name: {**asdict(time), "flops": self.work.flops[name], "bytes": self.work.bytes[name]}
                for name, time in self.parts.items()
            },
            "sending_seconds": self.sending_seconds,
            "hidden_seconds": self.hidden_seconds,
            "limits": self.limits._asdict(),
            "sent": self.sent,
            "planned": self.planned,
        }


def times_of_parts(trace: Trace) -> tuple[float, dict[str, PartTime], float, float]:
    """Means of a trace's steps, s: a step; each part; collectives on their way; and hidden behind computing."""
    steps = len(trace.steps)
    assert steps, "a trace without steps"
    whole = sum(end - start for start, end in trace.steps) / 1e6
    computing = [stretch for stretch in trace.computing if _within(stretch, trace.steps)]
    found: dict[str, PartTime] = {}
    for stretch in computing:
        _add(found, stretch.part, stretch.backward, stretch.seconds)
    sending = union((s.start, s.end) for s in trace.sending if _within(s, trace.steps))
    sent = sum(end - start for start, end in sending) / 1e6
    works = union((s.start, s.end) for s in computing if s.part != COMMUNICATION)
    hidden = overlap(sending, works) / 1e6
    if trace.on_gpu:
        # Kernels that run side by side share the time of their union alike.
        busy = sum(end - start for start, end in works) / 1e6
        alike = busy / sum(time.seconds for time in found.values())
        found = {name: PartTime(alike * time.forward, alike * time.backward) for name, time in found.items()}
        _add(found, COMMUNICATION, False, sent - hidden)
        _add(found, IDLE, False, whole - busy - (sent - hidden))
    else:
        _add(found, REST, False, whole - sum(time.seconds for time in found.values()))
    means = {
        name: PartTime(found[name].forward / steps, found[name].backward / steps)
        for name in (*PARTS, IDLE)
        if name in found
    }
    return whole / steps, means, sent / steps, hidden / steps


def _add(found: dict[str, PartTime], part: str, backward: bool, seconds: float) -> None:
    before = found.get(part, PartTime())
    found[part] = PartTime(before.forward + seconds * (not backward), before.backward + seconds * backward)


def _within(stretch: Stretch, steps: Iterable[tuple[float, float]]) -> bool:
    return any(start <= stretch.start < end for start, end in steps)


def table(profiles: Sequence[RankProfile]) -> str:
    """The table of all ranks: means over them, then what they send."""
    step, flops = fmean(p.step_seconds for p in profiles), fmean(p.limits.flops for p in profiles)
    bandwidth = fmean(p.limits.bandwidth for p in profiles)
    ranks = "1 process" if len(profiles) == 1 else f"mean of {len(profiles)} processes"
    lines = [
        f"a step of {1e3 * step:,.1f} ms ({ranks}, {counted(profiles[0].steps, 'step')})",
        f"limits of a process, measured on all at once: {flops / 1e12:,.3f} TFLOP/s, {bandwidth / 1e9:,.1f} GB/s",
        "",
        _row("part", "forward, ms", "backward, ms", "of step", "GFLOP", "TFLOP/s", "GB/s", "of limit"),
    ]
    for name in (*PARTS, IDLE):
        times = [profile.parts.get(name, PartTime()) for profile in profiles]
        forward, backward = fmean(t.forward for t in times), fmean(t.backward for t in times)
        seconds = forward + backward
        if not seconds:
            continue
        work, moved = fmean(p.work.flops[name] for p in profiles), fmean(p.work.bytes[name] for p in profiles)
        share = max(work / flops, moved / bandwidth) / seconds
        row = _row(
            name,
            _number(1e3 * forward, ",.2f"),
            _number(1e3 * backward, ",.2f"),
            _number(seconds / step, ".1%"),
            _number(work / 1e9, ",.2f"),
            _number(work / seconds / 1e12, ",.3f"),
            _number(moved / seconds / 1e9, ",.1f"),
            _number(share, ".1%"),
        )
        lines.append(row)
    total = fmean(sum(p.work.flops.values()) for p in profiles)
    rate = total / step
    everything = (f"{total / 1e9:,.2f}", f"{rate / 1e12:,.3f}", "", f"{rate / flops:.1%}")
    lines += [_row("all", f"{1e3 * step:,.2f}", "", "100.0%", *everything), "", *_sent(profiles)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _row(name: str, *cells: str) -> str:
    return f"{name:<20}" + "".join(f"{cell:>13}" for cell in cells)


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if value else "-"


def _sent(profiles: Sequence[RankProfile]) -> list[str]:
    """What is sent, and how much of the time for it is hidden."""
    kinds = sorted({kind for profile in profiles for kind in (*profile.sent, *profile.planned)})
    if not kinds:
        return ["nothing is sent"]
    sending, hidden = fmean(p.sending_seconds for p in profiles), fmean(p.hidden_seconds for p in profiles)
    lines = [
        f"collectives are on their way for {1e3 * sending:,.2f} ms of a step;"
        f" {hidden / sending if sending else 0:.0%} of that is hidden behind computing",
        _row("sent by a process", "bytes", "planned"),
    ]
    for kind in kinds:
        sent, planned = (fmean(getattr(p, which).get(kind, 0) for p in profiles) for which in ("sent", "planned"))
        differs = f"{sent / planned - 1:+.2%}" if planned else "not planned"
        lines.append(_row(kind, f"{sent:,.0f}", f"{planned:,.0f}", "exactly" if sent == planned else differs))
    return lines
