"""Stretches of a trace and their sums, on traces whose answer is known."""

from itertools import count
from typing import Any

import pytest

from ditmoe.launcher.profiling import parts
from ditmoe.launcher.profiling.parts import PREFIX
from ditmoe.launcher.profiling.table import IDLE, times_of_parts
from ditmoe.launcher.profiling.timeline import draw_timeline
from ditmoe.launcher.profiling.trace import STEP, Trace, overlap, trace_of, union

MAIN, RUNLOOP, BACKWARD_THREAD = 1, 2, 3
_external = count(1)


def event(
    name: str, start: float, end: float, kind: str = "cpu_op", thread: int = MAIN, **facts: Any
) -> dict[str, Any]:
    """An event in milliseconds; `number` is autograd's, `launched_by` what a kernel refers to."""
    arguments = {"External id": facts.get("launched_by", next(_external))}
    if "number" in facts:
        arguments["Sequence number"] = facts["number"]
    timing = {"ts": 1e3 * start, "dur": 1e3 * (end - start)}
    return {"ph": "X", "cat": kind, "name": name, "tid": thread, "args": arguments, **timing}


def annotation(name: str, start: float, end: float, thread: int = MAIN) -> dict[str, Any]:
    return event(name, start, end, "user_annotation", thread)


def traced(*events: dict[str, Any]) -> Trace:
    # In any order, as the profiler writes them.
    return trace_of({"baseTimeNanoseconds": 7_000_000_000, "traceEvents": [*reversed(events), {"ph": "M"}]})


def milliseconds(trace: Trace) -> dict[str, tuple[float, float]]:
    """Part → forward and backward; that they sum to the step is checked."""
    step, found, _, _ = times_of_parts(trace)
    assert sum(time.seconds for time in found.values()) == pytest.approx(step)
    return {
        name: (round(1e3 * time.forward, 6), round(1e3 * time.backward, 6))
        for name, time in found.items()
        if time.seconds > 1e-9
    }


def step_of_cpu() -> list[dict[str, Any]]:
    return [
        annotation(STEP, 0, 100),
        annotation(PREFIX + parts.DATA, 0, 5),
        annotation(PREFIX + parts.NORMS, 10, 60),
        annotation(PREFIX + parts.ATTENTION, 12, 20),
        event("aten::linear", 12, 19, number=1),
        annotation(PREFIX + parts.DISPATCH, 20, 50),
        event("aten::topk", 21, 25, number=2),
        event("aten::index_select", 25, 30, number=3),
        annotation(PREFIX + parts.EXPERTS, 30, 40),
        event("aten::linear", 30, 40, number=4),
        # A function of Python that waits for what is on its way from 41 to 49.
        event("_AllToAllV", 40, 50, number=5),
        event("c10d::alltoall_base_", 40, 41),
        annotation("gloo:all_to_all", 41, 49, RUNLOOP),
        event("autograd::engine::evaluate_function: AddmmBackward0", 60, 70, number=4),
        event("aten::mm", 60, 70),
        event("autograd::engine::evaluate_function: AddmmBackward0", 70, 75, number=1),
        # Hidden behind an operation, but for the last millisecond, in which nothing is computed.
        annotation("gloo:all_reduce", 70, 76, RUNLOOP),
        event("aten::mm", 70, 75),
        annotation(PREFIX + parts.OPTIMISER, 80, 90),
        event("aten::_fused_adamw_", 82, 88),
    ]


def test_each_moment_belongs_to_one_part() -> None:
    assert milliseconds(traced(*step_of_cpu())) == {
        parts.DATA: (5, 0),
        parts.NORMS: (2 + 10, 0),  # before attention, and after the mixture
        parts.ATTENTION: (8, 5),
        parts.ROUTER: (4, 0),
        parts.DISPATCH: (1 + 5 + 1, 0),  # until the choice; rows; the rest of the function that waited
        parts.EXPERTS: (10, 10),
        parts.COMMUNICATION: (1 + 8 + 1, 0),  # the call, the wait, and what was not hidden
        parts.OPTIMISER: (10, 0),
        parts.REST: (5 + 4 + 10, 0),
    }


def test_how_much_is_hidden() -> None:
    _, _, sending, hidden = times_of_parts(traced(*step_of_cpu()))
    assert (sending, hidden) == (pytest.approx(0.014), pytest.approx(0.005))


def test_a_number_that_comes_again_is_of_the_last_forward_operation() -> None:
    """Operations without a gradient have the number of the next node, and recomputed blocks run within a backward
    operation."""
    found = milliseconds(
        traced(
            annotation(STEP, 0, 100),
            annotation(PREFIX + parts.ROUTER, 0, 10),
            event("aten::detach", 0, 10, number=9),
            annotation(PREFIX + parts.EXPERTS, 10, 20),
            event("aten::mm", 10, 20, number=9),
            event("autograd::engine::evaluate_function: MmBackward0", 20, 100, number=9),
            annotation(PREFIX + parts.ATTENTION, 30, 60),
            event("aten::mm", 30, 60, number=10),
            event("aten::mm", 60, 100),
        )
    )
    assert found == {parts.ROUTER: (10, 0), parts.EXPERTS: (10, 50), parts.ATTENTION: (0, 30)}


def test_only_what_is_within_the_steps_counts_and_is_a_mean() -> None:
    twice = [annotation(STEP, 0, 10), annotation(STEP, 20, 40), event("aten::mm", 12, 18)]
    twice += [annotation(PREFIX + parts.MLP, 0, 10), annotation(PREFIX + parts.MLP, 20, 30)]
    assert milliseconds(traced(*twice)) == {parts.MLP: (10, 0), parts.REST: (5, 0)}


def test_a_gpu_s_kernels_are_of_the_operation_that_launched_them() -> None:
    """Also of a backward thread; kernels side by side share their time; what nothing hides is communication."""
    found = milliseconds(
        traced(
            annotation(STEP, 0, 100),
            annotation(PREFIX + parts.ATTENTION, 0, 4),
            event("aten::mm", 0, 2, number=1, launched_by=101),
            annotation(PREFIX + parts.EXPERTS, 4, 8),
            event("aten::mm", 4, 6, number=2, launched_by=102),
            event("autograd::engine::evaluate_function: MmBackward0", 10, 14, thread=BACKWARD_THREAD, number=2),
            event("aten::mm", 11, 13, thread=BACKWARD_THREAD, launched_by=103),
            event("gemm", 10, 30, "kernel", 7, launched_by=101),
            event("gemm", 20, 40, "kernel", 8, launched_by=102),
            event("gemm", 50, 70, "kernel", 7, launched_by=103),
            event("ncclDevKernel_AllReduce", 60, 90, "kernel", 9, launched_by=999),
        )
    )
    # 60 ms of kernels in a union of 50 ms.
    share = round(20 * 50 / 60, 6)
    assert found == {
        parts.ATTENTION: (share, 0),
        parts.EXPERTS: (share, share),
        parts.COMMUNICATION: (20, 0),
        IDLE: (30, 0),
    }


def test_intervals() -> None:
    assert union([(3, 4), (0, 2), (1, 2.5)]) == [(0, 2.5), (3, 4)]
    assert overlap([(0, 2.5), (3, 4)], [(1, 2), (2.25, 3.5)]) == pytest.approx(1.75)


def test_the_timeline_shows_every_part_in_its_colour() -> None:
    trace = traced(*step_of_cpu())
    picture = draw_timeline([(0, trace), (3, trace)])
    colours = [colour for _, colour in picture.getcolors(1 << 20) or []]
    shown = {colour for colour in colours if isinstance(colour, tuple) and max(colour) - min(colour) > 20}
    assert len(shown) >= 8 and picture.width == 1600
