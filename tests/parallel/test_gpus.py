"""Training engines on GPUs, by one rank and by two under NCCL, beside a CPU; prints a table of figures."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import torch

Runner = Callable[..., list[dict[str, Any]]]
Figures = list[tuple[str, str]]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]
found = torch.cuda.device_count()
two_gpus = pytest.mark.skipif(found < 2, reason=f"NCCL between two ranks needs two GPUs, and {found} is here")

COMMON: Final = {"steps": 4, "depth": 2, "clip": 0.3}
FP32: Final = 1e-3
"""Largest relative difference of losses and norms from the CPU's, without TF32."""
BF16: Final = 0.02
PLAIN_EXPERTS: Final = {
    "expert_parallel": {"async_split_plan": False, "combine_impl": "weighted_sum", "gate_up_impl": "separate"}
}
"""DeepSpeed's own defaults."""
NO_OVERLAP: Final = {"zero_optimization": {"overlap_comm": False}}

ALONE: Final[dict[str, dict[str, Any]]] = {
    **{f"ZeRO {zero}, fp32": {"zero": zero} for zero in range(4)},
    **{f"ZeRO {zero}, bf16": {"zero": zero, "precision": "bf16"} for zero in (1, 2, 3)},
    "DDPM, recomputation, bf16": {"objective": "ddpm", "precision": "bf16", "checkpointing": True},
    "offload": {"zero": 2, "offload": True},
}
TOGETHER: Final[dict[str, dict[str, Any]]] = {
    **{f"ZeRO {zero}, fp32": {"zero": zero} for zero in range(4)},
    **{f"ZeRO {zero}, bf16": {"zero": zero, "precision": "bf16"} for zero in (1, 2, 3)},
    **{f"ZeRO {zero}, no overlap": {"zero": zero, "deepspeed": NO_OVERLAP} for zero in (1, 2)},
    **{f"ZeRO {zero}, expert 2, bf16": {"zero": zero, "expert": 2, "precision": "bf16"} for zero in (1, 2, 3)},
    "expert 2, DeepSpeed's defaults": {"expert": 2, "precision": "bf16", "deepspeed": PLAIN_EXPERTS},
    "expert 2, starved": {"expert": 2, "precision": "bf16", "experts": 8, "starved": True},
    "2 stages": {"pipe": 2, "micro_batch": 4},
    "2 stages, bf16": {"pipe": 2, "micro_batch": 2, "precision": "bf16"},
    "2 tensor ranks": {"tensor": 2},
    "2 tensor ranks, bf16": {"tensor": 2, "precision": "bf16"},
}


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative one of all losses and norms."""
    one, other = np.array(found["curve"])[:, [0, 2]], np.array(expected["curve"])[:, [0, 2]]
    return float(np.abs(one / other - 1).max())


def compare(run_cases: Runner, world: int, cases: dict[str, dict[str, Any]], figures: Figures) -> None:
    """Train each case on so many GPUs, and its losses on a CPU in fp32."""
    whole = [{**COMMON, **case} for case in cases.values()]
    kinds = {(case.get("objective"), case.get("starved"), case.get("experts")) for case in whole}
    keys = ("objective", "starved", "experts")
    plain = [
        {**COMMON, "zero": 0, **{key: value for key, value in zip(keys, kind, strict=True) if value is not None}}
        for kind in sorted(kinds, key=str)
    ]
    references = dict(zip(sorted(kinds, key=str), run_cases(1, plain), strict=True))
    results = run_cases(world, whole, "gpu")
    wrong = []
    for name, case, result in zip(cases, whole, results, strict=True):
        assert "error" not in result, (name, result["error"])
        found = difference(result, references[tuple(case.get(key) for key in keys)])
        bound = BF16 if case.get("precision") == "bf16" else FP32
        figures.append((f"{world} GPU: {name}: largest difference of losses and norms", f"{found:.1e} ≤ {bound}"))
        if not found <= bound:
            wrong.append((name, found))
    assert not wrong, wrong


def test_one_gpu_follows_the_cpu(run_cases: Runner, figures: Figures) -> None:
    compare(run_cases, 1, ALONE, figures)


@two_gpus
def test_two_gpus_follow_the_cpu(run_cases: Runner, figures: Figures) -> None:
    compare(run_cases, 2, TOGETHER, figures)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=two_gpus)])
def test_the_host_waits_nowhere_in_a_step(run_cases: Runner, figures: Figures, world: int) -> None:
    """CUDA itself tells of waits; with experts dealt out there is one for the sizes in each layer, by an event."""
    cases = [
        {**COMMON, "zero": zero, "precision": precision, "waits": "as it is", "expert": expert}
        for zero, precision, expert in (
            (0, "fp32", 1),
            (1, "bf16", 1),
            (2, "bf16", 1),
            (3, "bf16", 1),
            (1, "bf16", world),
        )
        if zero < 3 or world > 1  # on one rank DeepSpeed stops for each weight that it need not gather
    ]
    for case, result in zip(cases, run_cases(world, cases, "gpu"), strict=True):
        name = f"ZeRO {case['zero']}, {case['precision']}, expert {case['expert']}"
        figures.append((f"{world} GPU: {name}: waits of a step", str(sum(result["waits"].values()))))
        assert not result["waits"], (case, result["waits"])


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=two_gpus)])
def test_a_step_that_is_not_finite_changes_nothing(run_cases: Runner, world: int) -> None:
    cases = [
        {**COMMON, "zero": zero, "precision": "bf16" if zero else "fp32", "poison": poison}
        for zero in range(4)
        for poison in ("loss", "gradient")
    ]
    for case, result in zip(cases, run_cases(world, cases, "gpu"), strict=True):
        found = result["poison"]
        assert found["kept"] and np.isfinite(found["after"]).all() and found["changed"] > 0.9, (case, found)
