"""A trace of torch's profiler as stretches of time, each of one part of the step.

A backward operation belongs to the part of the forward operation that it is the gradient of: autograd numbers both
alike. Work on a GPU belongs to the operation that launched it.
"""

import gzip
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from ditmoe.launcher.profiling.parts import COMMUNICATION, DISPATCH, OPTIMISER, PREFIX, REST, ROUTER

STEP: Final = f"{PREFIX}step"
"""The annotation around each step."""

_SENDING: Final = re.compile(r"^(gloo|nccl):|^nccl(Dev)?Kernel|^ncclKernel")
"""What the libraries call the time in which a collective is on its way."""
_COLLECTIVES: Final = ("c10d::", "record_param_comms")
_GLUE: Final = ("autograd::", "torch::autograd::")
_BACKWARD: Final = "autograd::engine::evaluate_function: "
_ROUTING: Final = ("aten::softmax", "aten::_softmax", "aten::topk", "aten::gather")
"""Operations of a mixture layer outside its modules that choose the experts; all others move rows."""


class Stretch(NamedTuple):
    """Time in which one thing goes on, µs since the epoch of the trace's clock."""

    start: float
    end: float
    part: str
    backward: bool

    @property
    def seconds(self) -> float:
        """How long it is."""
        return (self.end - self.start) / 1e6


@dataclass
class Trace:
    """What one rank did in the profiled steps."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    """Start and end of each step, µs."""
    computing: list[Stretch] = field(default_factory=list)
    """On a GPU its kernels; otherwise what the host does, without gaps. In order; on a CPU they do not overlap."""
    sending: list[Stretch] = field(default_factory=list)
    """Collectives on their way; they may overlap."""
    on_gpu: bool = False
    host: list[Stretch] = field(default_factory=list)
    """What the host does, without gaps; on a CPU the same as `computing`."""


@dataclass
class _Span:
    """An event of a thread, and those directly within it."""

    name: str
    start: float
    end: float
    number: int
    """Autograd's; -1 where there is none."""
    external: Any
    """What a GPU's work that it launched refers to."""
    is_operation: bool
    """And no annotation."""
    part: str = REST
    backward: bool = False
    children: "list[_Span]" = field(default_factory=list)

    @property
    def computes(self) -> bool:
        """Whether it works on tensors itself. What else there is may wait: functions of Python, and hooks, which
        run in autograd's own events."""
        return self.is_operation and "::" in self.name and not self.name.startswith(_COLLECTIVES + _GLUE)


def read_trace(path: Path) -> Trace:
    """Read a trace as `torch.profiler` exports it, `.json` or `.json.gz`."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        return trace_of(json.load(file))


def trace_of(document: dict[str, Any]) -> Trace:
    """The stretches of an exported trace."""
    base = document.get("baseTimeNanoseconds", 0) / 1e3
    events = [event for event in document["traceEvents"] if event.get("ph") == "X"]
    trace = Trace()
    spans: dict[Any, list[_Span]] = {}
    kernels = []
    for event in events:
        name, start = str(event["name"]), base + event["ts"]
        end, kind, arguments = start + event.get("dur", 0), event.get("cat", ""), event.get("args", {})
        if name == STEP and kind == "user_annotation":
            trace.steps.append((start, end))
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append((start, end, name, arguments.get("External id")))
        elif kind in ("cpu_op", "user_annotation"):
            if _SENDING.match(name):
                trace.sending.append(Stretch(start, end, COMMUNICATION, False))
            else:
                number, external = arguments.get("Sequence number", -1), arguments.get("External id")
                span = _Span(name, start, end, number, external, kind == "cpu_op")
                spans.setdefault(event["tid"], []).append(span)
    trace.steps.sort()
    roots = {thread: _nested(of_thread) for thread, of_thread in spans.items()}
    main = next((thread for thread, of_thread in spans.items() if any(s.name == STEP for s in of_thread)), None)
    everything = [span for thread in spans for span in spans[thread]]
    forward = _Forward()
    for thread in sorted(roots, key=lambda thread: thread != main):  # the forward pass is in the main thread
        for root in roots[thread]:
            _name_parts(root, REST, False, forward)
    trace.sending.sort()
    if main is not None:
        trace.host = list(_host_stretches(roots[main], trace.sending, trace.steps))
    if kernels:
        trace.on_gpu = True
        owners = {span.external: span for span in everything if span.external is not None}
        for start, end, name, external in sorted(kernels, key=lambda kernel: kernel[:2]):
            owner = owners.get(external)
            if _SENDING.match(name):
                trace.sending.append(Stretch(start, end, COMMUNICATION, False))
            elif owner is None:
                trace.computing.append(Stretch(start, end, REST, False))
            else:
                trace.computing.append(Stretch(start, end, owner.part, owner.backward))
        trace.sending.sort()
    else:
        trace.computing = trace.host
    return trace


def _nested(spans: list[_Span]) -> list[_Span]:
    """Put the events of a thread into those that contain them; the outermost ones."""
    roots: list[_Span] = []
    inside: list[_Span] = []
    # Of events that begin and end at once, the one that wraps others comes first.
    wraps = (STEP, PREFIX, _BACKWARD)
    order = {
        id(span): next((n for n, begins in enumerate(wraps) if span.name.startswith(begins)), len(wraps))
        for span in spans
    }
    for span in sorted(spans, key=lambda span: (span.start, -span.end, order[id(span)])):
        while inside and inside[-1].end <= span.start:
            inside.pop()
        (inside[-1].children if inside else roots).append(span)
        inside.append(span)
    return roots


class _Forward:
    """Which part the operation of the forward pass with a number of autograd's belongs to."""

    def __init__(self) -> None:
        self._starts: dict[int, list[float]] = {}
        self._parts: dict[int, list[str]] = {}

    def add(self, span: _Span) -> None:
        self._starts.setdefault(span.number, []).append(span.start)
        self._parts.setdefault(span.number, []).append(span.part)

    def part(self, span: _Span) -> str | None:
        """Of the last one before a backward operation: the number is given to the node that is made next, and so
        also to operations before it that make none."""
        place = bisect_right(self._starts.get(span.number, []), span.start)
        return self._parts[span.number][place - 1] if place else None


def _name_parts(span: _Span, part: str, backward: bool, forward: _Forward) -> None:
    """Give a span and all within it their parts."""
    if span.name.startswith(PREFIX):
        part = REST if span.name == STEP else span.name.removeprefix(PREFIX)
    elif span.name.startswith("Optimizer.step#"):
        part = OPTIMISER
    elif span.name.startswith(_COLLECTIVES):
        part = COMMUNICATION
    elif span.name.startswith(_BACKWARD):
        part, backward = forward.part(span) or part, True
    elif part == DISPATCH and span.name in _ROUTING:
        part = ROUTER
    span.part, span.backward = part, backward
    if span.number >= 0 and not backward:
        forward.add(span)
    for child in span.children:
        _name_parts(child, part, backward, forward)


def _host_stretches(
    roots: Sequence[_Span], sending: Sequence[Stretch], steps: Sequence[tuple[float, float]]
) -> Iterator[Stretch]:
    """The main thread's time within the steps; where it waits for a collective, that is communication."""
    on_its_way = union((stretch.start, stretch.end) for stretch in sending)
    for start, end, span in _own_time(roots):
        if not any(begin <= start < stop for begin, stop in steps):
            continue
        if span.computes or span.part in (COMMUNICATION, *_NOT_WAITING):
            yield Stretch(start, end, span.part, span.backward)
            continue
        for first, last, waits in _cut(start, end, on_its_way):
            yield Stretch(first, last, COMMUNICATION if waits else span.part, span.backward and not waits)


_NOT_WAITING: Final = ("data", "records")
"""Parts whose own waits are theirs, whatever is on its way meanwhile."""


def _own_time(roots: Sequence[_Span]) -> Iterator[tuple[float, float, _Span]]:
    """The time of each span without that of those within it, in order."""
    for span in roots:
        at = span.start
        for child in span.children:
            if child.start > at:
                yield at, child.start, span
            yield from _own_time([child])
            at = max(at, child.end)
        if span.end > at:
            yield at, span.end, span


def _cut(
    start: float, end: float, intervals: Sequence[tuple[float, float]]
) -> Iterator[tuple[float, float, bool]]:
    """A stretch of time cut where intervals begin and end; whether each piece is in one."""
    at = start
    for begin, stop in intervals[max(0, bisect_right(intervals, (start,)) - 1) :]:
        if begin >= end:
            break
        if stop <= at:
            continue
        if begin > at:
            yield at, begin, False
        yield max(at, begin), min(stop, end), True
        at = min(stop, end)
    if at < end:
        yield at, end, False


def union(intervals: Any) -> list[tuple[float, float]]:
    """Intervals joined where they touch, in order."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def overlap(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> float:
    """Length that two sequences of disjoint intervals, in order, have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total
