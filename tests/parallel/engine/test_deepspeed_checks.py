"""What DeepSpeed does with weights and gradients is compared with what the engine takes it to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import checkpoint_path, read_weights
from ditmoe.parallel.engine.deepspeed_engine import blaming_settings
from ditmoe.parallel.engine.pattern import LENGTH, project, stretches

Runner = Callable[..., list[dict[str, Any]]]

ORDERS: Final = ("round_robin_gradients", "parameter_alignment")
"""Settings that lay the fp32 weights out otherwise."""


@pytest.mark.timeout(280)
def test_checkpoints_do_not_know_the_order_of_flat_buffers(run_cases: Runner, tmp_path: Path) -> None:
    """The weights of all parts stand under their names, and the run goes on from them on another layout."""
    common = {"expert": 2, "steps": 3, "depth": 2, "clip": 0.3}
    cases = [
        {
            **common,
            "zero": zero,
            "save": str(tmp_path / f"{zero}-{key}"),
            "deepspeed": {"zero_optimization": {key: True} if key else {}},
        }
        for zero in (1, 2)
        for key in (None, *ORDERS)
    ]
    results = run_cases(2, cases)
    for zero in (1, 2):
        plain, *others = (result for case, result in zip(cases, results, strict=True) if case["zero"] == zero)
        for other in others:
            np.testing.assert_allclose(other["curve"], plain["curve"], rtol=1e-5)
        # AdamW scales up the rounding noise that is the gradient of key biases: its moments tell more.
        for part, atol in (("weights", 3e-4), ("ema", 3e-4), ("exp_avg", 1e-7), ("exp_avg_sq", 1e-10)):
            saved = [read_weights(checkpoint_path(tmp_path / f"{zero}-{key}", 3), part) for key in (None, *ORDERS)]
            for key, state in zip(ORDERS, saved[1:], strict=True):
                for name, tensor in saved[0].items():
                    torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=atol, msg=f"{name}, {key}")


@pytest.mark.timeout(280)
def test_a_surprise_ends_the_run_with_a_message(run_cases: Runner) -> None:
    """Exchanged parameters at the start, though both are zeros; another gradient in the first step."""
    cases = [
        {"zero": zero, "expert": 2, "steps": 1, "depth": 2, "fault": fault}
        for zero in (0, 1, 3)
        for fault in ("exchanged names", "doubled gradient")
    ]
    for case, result in zip(cases, run_cases(2, cases), strict=True):
        message = result["error"]
        assert "DeepSpeed 0.19.8" in message and "constraints.txt" in message
        if case["fault"] == "exchanged names":
            assert "2 parameters (" in message and message.count("proj.bias") == 2, message
        else:
            assert "blocks.1.attn.proj.weight differs by" in message, message


@pytest.mark.timeout(280)
def test_an_infinite_gradient_is_not_passed_over(run_cases: Runner) -> None:
    """DeepSpeed leaves out such a step by itself; the norm that it reports then tells of it, on every stage."""
    cases = [{"zero": zero, "steps": 1, "depth": 2, "fault": "infinite gradient"} for zero in range(4)]
    for case, result in zip(cases, run_cases(2, cases), strict=True):
        ((loss, _, norm),) = result["curve"]
        assert np.isfinite(loss) and not np.isfinite(norm), case


def test_numbers_tell_places_apart() -> None:
    values = torch.zeros(LENGTH + 100, dtype=torch.bfloat16)
    for stretch, numbers in stretches("a", 7, values):
        stretch.copy_(numbers)
    assert values.unique().numel() == 255, "all are integers that bfloat16 holds"
    whole = torch.zeros(len(values) + 7)
    for stretch, numbers in stretches("a", 0, whole):
        stretch.copy_(numbers)
    assert whole[7:].equal(values.float()), "numbers belong to places, wherever a stretch begins"
    other = torch.zeros(16)
    for stretch, numbers in stretches("b", 0, other):
        stretch.copy_(numbers)
    assert (other != whole[:16]).sum() > 10


def test_projections_are_linear() -> None:
    first, second = torch.linspace(-1, 1, 1000), torch.linspace(0, 2, 1000) ** 2

    def projected(start: int, values: torch.Tensor) -> float:
        return float(project("a", start, values))

    total = projected(0, first + second)
    assert projected(0, first) + projected(0, second) == pytest.approx(total, rel=1e-5)
    assert projected(0, first[:400]) + projected(400, first[400:]) == pytest.approx(projected(0, first), rel=1e-5)
    assert projected(0, first[:400]) + projected(401, first[400:]) != pytest.approx(projected(0, first), rel=1e-3)


def test_only_errors_about_settings_are_blamed_on_them() -> None:
    """Memory that runs out at the start stays what it is, with its traceback and a note of what was set."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    extra = {"zero_optimization": {"sub_group_size": 1000}}
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as memory, blaming_settings(extra):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert memory.value.__notes__ == [f"The configuration adds to DeepSpeed's settings: deepspeed = {extra}"]
    with pytest.raises(UserError, match="DeepSpeed rejects these settings") as rejected, blaming_settings(extra):
        DeepSpeedZeroConfig(sub_group_size="many")
    assert "sub_group_size" in str(rejected.value) and rejected.value.__cause__ is not None
    with pytest.raises(KeyError), blaming_settings({}):
        raise KeyError("a fault of the program")
