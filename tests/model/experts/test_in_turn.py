"""Experts in turn with gradients in place, against the plain products."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ditmoe.model.experts.in_turn import rounded_up
from ditmoe.model.experts.moe import Experts

HIDDEN, WIDTH, EXPERTS = 32, 64, 8
COUNTS = ([6] * 8, [48, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 48], [0, 1, 2, 3, 0, 0, 40, 2])


def make_experts(dtype: torch.dtype) -> Experts:
    torch.manual_seed(0)
    experts = Experts(EXPERTS, HIDDEN, WIDTH)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts.to(dtype)


def passed(experts: Experts, run, counts: list[int]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Result and gradients."""
    torch.manual_seed(1)
    dtype = experts.gate_proj.dtype
    x_AD = torch.randn(48, HIDDEN).to(dtype).requires_grad_()
    experts.zero_grad()
    out = run(x_AD, torch.tensor(counts))
    out.backward(torch.randn(48, HIDDEN).to(dtype))
    found = [out, x_AD.grad, *(parameter.grad for parameter in experts.parameters())]
    return [tensor.detach().float() for tensor in found]  # type: ignore[union-attr]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients_are_the_plain_ones(counts: list[int], dtype: torch.dtype) -> None:
    """Random routing, experts without rows, one with all; in bf16 as exact as the plain way."""
    experts = make_experts(dtype)
    found, plain = (passed(experts, run, counts) for run in (experts, experts.one_by_one))
    exact = passed(experts.double(), experts.one_by_one, counts)
    for ours, theirs, expected in zip(found, plain, exact, strict=True):
        scale = expected.abs().max()
        if dtype == torch.float32:
            assert (ours - theirs).abs().max() <= 1e-6 * scale
        assert (ours - expected).abs().max() <= 1.5 * (theirs - expected).abs().max() + 1e-3 * scale
        assert bool((expected == 0).eq(ours == 0).all())


def test_gradients_that_nobody_asks_for_are_not_made() -> None:
    experts = make_experts(torch.float32)
    expected = passed(experts, experts.one_by_one, COUNTS[3])
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(name == "up_proj")
    x_AD = torch.randn(48, HIDDEN, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    x_AD = torch.randn(48, HIDDEN)
    experts.zero_grad()
    experts(x_AD, torch.tensor(COUNTS[3])).backward(torch.randn(48, HIDDEN))
    assert experts.gate_proj.grad is None and experts.down_proj.grad is None
    torch.testing.assert_close(experts.up_proj.grad, expected[3])


def test_recomputed_it_is_the_same() -> None:
    experts = make_experts(torch.float32)
    expected = passed(experts, experts, COUNTS[3])
    found = passed(experts, lambda *inputs: checkpoint(experts, *inputs, use_reentrant=False), COUNTS[3])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_add_up_over_micro_batches() -> None:
    experts = make_experts(torch.float32)
    once = passed(experts, experts, COUNTS[0])[2:]
    torch.manual_seed(1)
    x_AD, towards = torch.randn(48, HIDDEN), torch.randn(48, HIDDEN)
    experts.zero_grad()
    for _ in range(2):
        experts(x_AD, torch.tensor(COUNTS[0])).backward(towards)
    for parameter, expected in zip(experts.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * expected)


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same() -> None:
    experts = make_experts(torch.bfloat16)
    x_AD, counts_N = torch.randn(48, HIDDEN).bfloat16(), torch.tensor(COUNTS[3])
    expected = experts(x_AD, counts_N)
    with torch.no_grad():
        found = experts(x_AD, counts_N)
    assert found.grad_fn is None and torch.equal(found, expected)


def test_rows_are_rounded_up_to_few_numbers_by_an_eighth_at_most() -> None:
    assert [rounded_up(count) for count in (0, 1, 16, 17, 127, 128, 129, 300, 600)] == [
        *(0, 16, 16, 32, 128, 128, 144, 320, 640)
    ]
    rounded = {count: rounded_up(count) for count in range(1, 4097)}
    assert all(count <= rows <= max(count + 15, 1.125 * count) for count, rows in rounded.items())
    assert all(rounded_up(rows) == rows for rows in rounded.values())
    assert len(set(rounded.values())) <= 8 * 6


@pytest.mark.parametrize("gradients", [True, False])
def test_products_in_bf16_have_few_shapes(gradients: bool) -> None:
    """oneDNN makes a kernel for each: of new numbers of rows in each step, that took longer than the products."""
    experts = make_experts(torch.bfloat16)
    shapes: set[tuple[int, ...]] = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            if function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default):
                left, right = [tensor for tensor in given if isinstance(tensor, Tensor)][-2:]
                shapes.add((*left.shape, right.shape[1]))
            return function(*given, **(named or {}))

    drawn = torch.Generator().manual_seed(0)
    for _ in range(40):
        counts_N = torch.randint(EXPERTS, (512,), generator=drawn).bincount(minlength=EXPERTS)
        x_AD = torch.randn(512, HIDDEN, generator=drawn).bfloat16().requires_grad_(gradients)
        with Shapes(), torch.set_grad_enabled(gradients):
            out = experts(x_AD, counts_N)
            if gradients:
                out.backward(torch.randn(512, HIDDEN, generator=drawn).bfloat16())
    rows = {rounded_up(count) for count in range(32, 112)}
    assert 4 <= len(shapes) <= len(rows) * (7 if gradients else 2)
    assert all(rows & set(shape) for shape in shapes)
