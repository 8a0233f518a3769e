"""One configuration has one loss curve, whatever the layout.

All cases of one world size run in one start of its processes; each test then compares its own.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest

Runner = Callable[..., list[dict[str, Any]]]
Result = dict[str, Any]

ZERO_STAGES: Final = (0, 1, 2, 3)
CURVES: Final = ("loss", "balance loss", "gradient norm")
EXACT: Final = 1e-5
"""Largest relative difference in fp32, over all steps of all three curves."""
BF16: Final = 0.01
"""Stated bound of bf16: relative difference of the loss from fp32's."""

MAIN: Final = {"clip": 0.3}
DDPM: Final = {"objective": "ddpm", "steps": 8}
GROUP: Final = {"steps": 6, "balance_group": 8}
BATCH: Final = {"steps": 6, "balance_group": 0}
STARVED: Final = {"steps": 6, "experts": 8, "starved": True}
DENSE: Final = {"experts": 0, "steps": 6}
NOTHING_STAYS: Final = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""As in a large network: ZeRO 3 puts every weight away after its use, whatever its size."""

CASES: Final[dict[str, tuple[int, Result]]] = {
    "reference": (1, {**MAIN, "zero": 0}),
    **{f"1 process, ZeRO {zero}": (1, {**MAIN, "zero": zero}) for zero in (1, 2, 3)},
    **{
        f"{world} processes, expert 2, ZeRO {zero}": (world, {**MAIN, "zero": zero, "expert": 2})
        for world in (2, 4)
        for zero in ZERO_STAGES
    },
    "ddpm reference": (1, {**DDPM, "micro_batch": 8}),
    "ddpm, accumulation 4": (2, {**DDPM, "micro_batch": 1, "zero": 2, "expert": 2}),
    "ddpm, recomputation, ZeRO 3": (2, {**DDPM, "micro_batch": 4, "zero": 3, "expert": 2, "checkpointing": True}),
    "ddpm, recomputation, ZeRO 0": (2, {**DDPM, "micro_batch": 2, "zero": 0, "checkpointing": True}),
    "ddpm, recomputation, ZeRO 3, experts whole": (
        2,
        {**DDPM, "micro_batch": 4, "zero": 3, "checkpointing": True},
    ),
    "ddpm, recomputation, ZeRO 3, nothing stays": (
        2,
        {**DDPM, "micro_batch": 2, "zero": 3, "checkpointing": True, "deepspeed": NOTHING_STAYS},
    ),
    "own group": (1, {**GROUP, "micro_batch": 8, "balance_group": 1}),
    "group reference": (1, {**GROUP, "micro_batch": 8}),
    "group over four ranks": (4, {**GROUP, "micro_batch": 2, "expert": 4}),
    "dense reference": (1, {**DENSE, "zero": 0}),
    **{f"dense, ZeRO {zero}": (2, {**DENSE, "zero": zero}) for zero in ZERO_STAGES},
    "2 stages": (2, {**MAIN, "pipe": 2, "zero": 1, "micro_batch": 4}),
    "2 stages, recomputation": (2, {**MAIN, "pipe": 2, "zero": 0, "micro_batch": 1, "checkpointing": True}),
    **{
        f"2 stages × data 2, expert {expert}, ZeRO {zero}": (
            4,
            {**MAIN, "pipe": 2, "zero": zero, "expert": expert, "micro_batch": 1},
        )
        for expert, zero in ((1, 0), (2, 0), (2, 1))
    },
    "ddpm, 3 stages": (3, {**DDPM, "pipe": 3, "micro_batch": 4, "zero": 1}),
    "ddpm, 3 stages, ZeRO 0": (3, {**DDPM, "pipe": 3, "micro_batch": 1, "zero": 0, "checkpointing": True}),
    "ddpm, 4 stages": (4, {**DDPM, "pipe": 4, "depth": 5, "micro_batch": 1}),
    "ddpm, 5 blocks": (1, {**DDPM, "depth": 5, "micro_batch": 8}),
    "group over two ranks of two stages": (4, {**GROUP, "pipe": 2, "expert": 2, "micro_batch": 4}),
    "batch reference": (1, {**BATCH, "micro_batch": 8, "zero": 0}),
    "batch, accumulation 4": (2, {**BATCH, "micro_batch": 1, "expert": 2, "checkpointing": True}),
    "batch, two ranks of two stages": (4, {**BATCH, "pipe": 2, "expert": 2, "micro_batch": 2}),
    "starved reference": (1, {**STARVED, "zero": 0}),
    "starved, expert 2": (2, {**STARVED, "expert": 2, "zero": 2}),
    "starved, 2 stages, expert 2": (4, {**STARVED, "expert": 2, "pipe": 2}),
    "dense, 2 stages": (2, {**DENSE, "pipe": 2}),
    "1 process, offload, ZeRO 1": (1, {**MAIN, "zero": 1, "offload": True}),
    **{
        f"2 processes, expert 2, offload, ZeRO {zero}": (2, {**MAIN, "zero": zero, "expert": 2, "offload": True})
        for zero in (2, 3)
    },
    "2 stages, offload": (2, {**MAIN, "pipe": 2, "zero": 1, "offload": True}),
    "bf16, offload": (2, {**MAIN, "precision": "bf16", "zero": 2, "expert": 2, "offload": True}),
    "bf16, 2 stages": (2, {**MAIN, "precision": "bf16", "zero": 1, "pipe": 2}),
    **{f"bf16, ZeRO {zero}": (2, {**MAIN, "precision": "bf16", "zero": zero, "expert": 2}) for zero in (1, 2, 3)},
}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(run_cases: Runner) -> dict[str, Result]:
    """Name of a case → its result."""
    found: dict[str, Result] = {}
    for world in (1, 2, 3, 4):
        names = [name for name, (processes, _) in CASES.items() if processes == world]
        found |= zip(names, run_cases(world, [CASES[name][1] for name in names]), strict=True)
    return found


def curve(result: Result) -> Any:
    """`[steps, 3]`: loss, balance loss, gradient norm."""
    return np.array(result["curve"])


def assert_same_curve(result: Result, reference: Result, curves: int = len(CURVES)) -> None:
    """The first so many of the three curves agree at every step."""
    found, expected = curve(result)[:, :curves], curve(reference)[:, :curves]
    assert found.shape == expected.shape
    worst = np.max(np.abs(found - expected) / np.abs(expected), axis=0)
    for name, difference in zip(CURVES, worst, strict=False):
        assert difference <= EXACT, f"{name} differs by {difference:.1e}"


@pytest.mark.timeout(280)
def test_the_reference_moves(results: dict[str, Result]) -> None:
    losses = curve(results["reference"])[:, 0]
    assert len(losses) == 20 and np.ptp(losses) > 0.1
    assert curve(results["reference"])[:, 2].max() > 0.3, "clipping is never active"


@pytest.mark.parametrize("name", [name for name in CASES if "process" in name or name.startswith("2 stages")])
def test_twenty_steps_agree(results: dict[str, Result], name: str) -> None:
    assert_same_curve(results[name], results["reference"])
    assert results[name]["ema"] == pytest.approx(results["reference"]["ema"], rel=EXACT)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("ddpm,") and "blocks" not in n])
def test_accumulation_recomputation_and_stages_change_nothing(results: dict[str, Result], name: str) -> None:
    deeper = "depth" in CASES[name][1]
    assert_same_curve(results[name], results["ddpm, 5 blocks" if deeper else "ddpm reference"])


def test_balance_loss_over_the_global_micro_step(results: dict[str, Result]) -> None:
    own, reference = curve(results["own group"]), curve(results["group reference"])
    assert abs(own[0, 1] / reference[0, 1] - 1) > 1e-4, "the group makes no difference here"
    for name in ("group over four ranks", "group over two ranks of two stages"):
        assert_same_curve(results[name], results["group reference"])


def test_balance_loss_over_the_global_batch(results: dict[str, Result]) -> None:
    """Whatever the micro-batch; in the first step the shares count as alike, so that each layer's loss is α."""
    own, reference = curve(results["own group"]), curve(results["batch reference"])
    assert abs(own[2, 1] / reference[2, 1] - 1) > 1e-4, "the set makes no difference here"
    assert reference[0, 1] == pytest.approx(3 * 0.05)
    for name in ("batch, accumulation 4", "batch, two ranks of two stages"):
        assert_same_curve(results[name], results["batch reference"])


@pytest.mark.parametrize("name", ["starved, expert 2", "starved, 2 stages, expert 2"])
def test_experts_without_tokens(results: dict[str, Result], name: str) -> None:
    """On both ranks some experts get nothing in any micro-batch."""
    load_LN = np.array(results["starved reference"]["load"][0])
    assert (load_LN == 0).sum(1).tolist() == [4, 4, 4]
    assert_same_curve(results[name], results["starved reference"])


@pytest.mark.parametrize("layout", [*(f"ZeRO {zero}" for zero in ZERO_STAGES), "2 stages"])
def test_a_dense_network_trains(results: dict[str, Result], layout: str) -> None:
    found, reference = curve(results[f"dense, {layout}"]), curve(results["dense reference"])
    assert np.max(np.abs(found[:, [0, 2]] / reference[:, [0, 2]] - 1)) <= EXACT
    assert not found[:, 1].any(), "a dense network has no balance loss"


@pytest.mark.parametrize("layout", ("ZeRO 1", "ZeRO 2", "ZeRO 3", "2 stages", "offload"))
def test_bf16_stays_near_fp32(results: dict[str, Result], layout: str) -> None:
    found, reference = curve(results[f"bf16, {layout}"]), curve(results["reference"])
    difference = np.max(np.abs(found[:, 0] / reference[:, 0] - 1))
    assert 0 < difference < BF16


@pytest.mark.parametrize("zero", (1, 2, 3))
def test_each_rank_owns_its_share(results: dict[str, Result], zero: int) -> None:
    """ZeRO cuts the fp32 state evenly: four ranks own a quarter each, up to padding."""
    share = results[f"4 processes, expert 2, ZeRO {zero}"]["owned"] / results["reference"]["owned"]
    assert share == pytest.approx(1 / 4, rel=0.01)


def test_no_process_loads_a_compiler(results: dict[str, Result]) -> None:
    """It would take each of them a second at the start, and none uses it."""
    assert not any(result["compiler"] for result in results.values())


@pytest.mark.gpu
def test_gpu_follows_the_cpu(run_cases: Runner) -> None:
    (reference,) = run_cases(1, [MAIN])
    fp32, bf16 = run_cases(1, [{**MAIN, "zero": 1}, {**MAIN, "zero": 3, "precision": "bf16"}], "gpu")
    for result, bound in ((fp32, 1e-3), (bf16, BF16)):
        assert np.max(np.abs(curve(result)[:, 0] / curve(reference)[:, 0] - 1)) < bound
