"""No host waits between the backward pass and the optimiser, and a step that is not finite changes nothing."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import torch

from ditmoe.parallel.engine.step_totals import DeviceTotals
from ditmoe.parallel.engine.update import clipping_divisor, square_of_norm

Runner = Callable[..., list[dict[str, Any]]]

COMMON: Final = {"steps": 2, "depth": 2, "clip": 0.3}


@pytest.mark.timeout(280)
def test_a_step_waits_for_nothing(run_cases: Runner) -> None:
    """On every stage, in both number types."""
    cases = [
        {**COMMON, "zero": zero, "precision": precision, "objective": kind, "waits": path}
        for zero, precision, kind, path in (
            (0, "fp32", "rectified_flow", "batched"),
            (1, "bf16", "ddpm", "grouped"),
            (2, "bf16", "rectified_flow", "grouped"),
            (3, "bf16", "rectified_flow", "batched"),
        )
    ]
    for case, result in zip(cases, run_cases(1, cases), strict=True):
        # ZeRO 3 looks at a norm that the host has made.
        waits = {place: count for place, count in result["waits"].items() if "is_invalid_grad_norm" not in place}
        assert not waits, case


@pytest.mark.timeout(280)
def test_one_data_rank_copies_gradients_and_weights_between_number_types_alone(run_cases: Runner) -> None:
    """In bf16 once each, to where AdamW reads and from where it writes; in fp32 it steps the network's own
    weights. DeepSpeed copies gradients three or four times."""
    cases = [
        {**COMMON, "zero": zero, "precision": precision}
        for zero, precision in ((1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16"))
    ]
    for case, result in zip(cases, run_cases(1, [{**case, "copies": True} for case in cases]), strict=True):
        assert result["copies"] == pytest.approx(2 * (case["precision"] == "bf16"), abs=0.02), case


@pytest.mark.timeout(280)
def test_a_step_that_is_not_finite_changes_nothing(run_cases: Runner) -> None:
    """Nor does the next one, which was started before it was looked at; then the run goes on."""
    cases = [
        {**COMMON, "zero": zero, "poison": poison, **more}
        for zero, poison, more in (
            (0, "gradient", {}),
            (1, "loss", {"expert": 2}),
            (1, "gradient", {"precision": "bf16"}),
            (2, "loss", {}),
            (3, "gradient", {"expert": 2}),
            (1, "loss", {"pipe": 2, "micro_batch": 4}),
        )
    ]
    for case, result in zip(cases, run_cases(2, cases), strict=True):
        found = result["poison"]
        assert found["told"] in ("the loss is nan", "inf", "nan"), case
        assert found["kept"], case
        first, last = found["steps"]
        assert last == first + (1 if case["poison"] == "loss" else 3), case
        assert np.isfinite(found["after"]).all() and found["changed"] > 0.9, (case, found)


def test_what_is_summed_is_what_is_read() -> None:
    sums = torch.tensor([6.0, 3.0, 2.0, 25.0, 0.5, 0.25, 1.0, 3.0, 2.0, 2.0], dtype=torch.float64)
    totals = DeviceTotals(sums, layers=2, experts=2)
    totals.start_reading()
    read = totals.read()
    assert (read.loss, read.balance_loss, read.grad_norm, read.requests) == (2.0, 0.75, 5.0, 2)
    assert read.load_LN.tolist() == totals.load_LN().tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert totals.norm.item() == 5.0 and totals.not_finite().item() == 0.0
    for number in (0, 3):
        for value in (torch.nan, torch.inf):
            broken = sums.clone()
            broken[number] = value
            assert DeviceTotals(broken, 2, 2).not_finite().item() == 1.0


@pytest.mark.parametrize(("norm", "divisor"), [(0.1, 1.0), (0.5, 1.0), (5.0, 10.0)])
def test_only_a_larger_norm_is_clipped(norm: float, divisor: float) -> None:
    found = clipping_divisor(torch.tensor(norm, dtype=torch.float64), 0.5)
    assert found.item() == pytest.approx(divisor, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spread", "error"), [(0.0, 4e-8), (4.0, 2e-7)])
def test_the_norm_is_exact_whatever_the_pieces(dtype: torch.dtype, spread: float, error: float) -> None:
    """Pieces of any length and layout; where one number outweighs all others it is as exact as that is."""
    torch.manual_seed(0)
    shapes = [(1,), (0,), (255,), (256,), (1000, 513), (3, 5, 7)]
    pieces = [(torch.randn(shape) * torch.exp(spread * torch.randn(shape))).to(dtype) for shape in shapes]
    pieces.append(pieces[4].t())
    exact = torch.stack([piece.double().square().sum() for piece in pieces]).sum()
    assert square_of_norm(pieces).dtype == torch.float64
    torch.testing.assert_close(square_of_norm(pieces), exact, rtol=error, atol=0)
    assert not torch.isfinite(square_of_norm([*pieces, torch.tensor([float("nan")])]))
