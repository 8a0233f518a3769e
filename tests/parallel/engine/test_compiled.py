"""Training with compiled blocks has the loss curve of training without, on every layout that it goes with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Runner = Callable[..., list[dict[str, Any]]]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"zero": 0}),
    "recomputed": (1, {"checkpointing": True, "clip": 0.5}),
    "accumulated": (1, {"batch": 8, "micro_batch": 2, "balance_group": 0}),
    "offloaded": (1, {"zero": 2, "offload": True}),
    "dense": (1, {"experts": 0, "balance_group": 0}),
    "query-key norm": (1, {"attention": "qk_norm"}),
    "experts dealt out": (2, {"expert": 2, "zero": 2}),
    "data ranks": (2, {"zero": 1}),
    "stages": (2, {"pipe": 2, "zero": 1}),
    "stages, recomputed": (2, {"pipe": 2, "zero": 0, "checkpointing": True}),
}


@pytest.fixture(scope="module")
def curves(run_cases: Runner) -> dict[str, list[dict[str, Any]]]:
    """Of each layout what was trained without and with compiled blocks."""
    found: dict[str, list[dict[str, Any]]] = {}
    for world in (1, 2):
        names = [name for name, (processes, _) in LAYOUTS.items() if processes == world]
        cases = [
            {"steps": 6, "depth": 2, "compile": compile, **LAYOUTS[name][1]}
            for compile in (False, True)
            for name in names
        ]
        results = run_cases(world, cases)
        found |= {name: results[place :: len(names)] for place, name in enumerate(names)}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_curve_is_that_without(curves: dict[str, list[dict[str, Any]]], layout: str) -> None:
    """No block was compiled but those that were prepared: the worker would have failed."""
    without, with_code = curves[layout]
    assert len(with_code["curve"]) == 6
    np.testing.assert_allclose(with_code["curve"], without["curve"], rtol=1e-5)
    np.testing.assert_allclose(with_code["ema"], without["ema"], rtol=1e-5)
    assert with_code["curve"] != without["curve"], "the same bits: was anything compiled?"


def test_in_bf16_it_is_as_near_to_fp32(run_cases: Runner) -> None:
    common = {"steps": 6, "depth": 2, "zero": 1}
    exact, without, with_code = run_cases(
        1,
        [{**common}, {**common, "precision": "bf16"}, {**common, "precision": "bf16", "compile": True}],
    )
    for column in (0, 2):
        off = [
            np.abs(np.array(each["curve"])[:, column] / np.array(exact["curve"])[:, column] - 1).max()
            for each in (without, with_code)
        ]
        assert off[1] < 1.5 * off[0] + 1e-3
