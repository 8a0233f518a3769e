"""Compiled blocks against the same blocks without a compiler: predictions and every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ditmoe.model.compiling.blocks import compiled_blocks
from ditmoe.model.dit import Block, DiT
from ditmoe.model.experts import moe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Maker = Callable[..., DiT]
Passes = Callable[..., dict[str, Tensor]]
ROUTINGS = {
    "random": (2, None),
    "experts without tokens": (2, (1, 3)),
    "one expert with all": (1, (2,)),
}
"""Name → experts of a token, and which they are; None: the router's choice."""


def fixed_route(chosen: tuple[int, ...]) -> Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]:
    """Routes each token to the same experts, with the router's weights."""

    def route(logits_TN: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor, Tensor]:
        assert experts_per_token == len(chosen)
        probabilities_TN = logits_TN.float().softmax(1)
        selected_TK = torch.tensor(chosen).expand(len(logits_TN), -1)
        return probabilities_TN.gather(1, selected_TK), selected_TK, probabilities_TN

    return route


def error(found: Tensor, exact: Tensor, least: float = 1e-30) -> float:
    """Of a whole tensor, relative to its norm, or to `least` where that is larger."""
    return float((found.double() - exact.double()).norm()) / max(float(exact.double().norm()), least)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("routing", [*ROUTINGS, "dense"])
@pytest.mark.parametrize("attention", ["plain", "qk_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_predictions_and_gradients_are_those_without_a_compiler(
    make_lively: Maker,
    passes: Passes,
    inputs: Any,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    attention: str,
    routing: str,
    recompute: bool,
) -> None:
    """In fp32 within rounding; in bf16 as near to fp32 as without a compiler."""
    each, chosen = ROUTINGS.get(routing, (0, None))
    shape = {"attention": attention, "experts": 4 if each else 0, "experts_per_token": each, "hidden": 48}
    if chosen is not None:
        monkeypatch.setattr(moe, "route", fixed_route(chosen))
    elif dtype == torch.bfloat16 and each:
        # Rounding would send tokens that are on the edge to other experts.
        monkeypatch.setattr(moe, "route", fixed_route((0, 2)))
    network, exact = make_lively(dtype, **shape), make_lively(**shape)
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            parameter.copy_(network.get_parameter(name))
    network.checkpoint_blocks = recompute
    without = passes(network, inputs)
    network.compute_block = compiled_blocks(with_gradients=True)
    with_code = passes(network, inputs)
    # Some gradients are zero but for rounding, such as that of a bias of keys, which softmax does not see.
    least = 1e-2 * max(float(value.norm()) for value in without.values())
    if dtype == torch.float32:
        for name, value in without.items():
            assert error(with_code[name], value, least) < 2e-6, name
        return
    reference = passes(exact, inputs)
    for name, value in reference.items():
        assert error(with_code[name], value, least) < 1.3 * error(without[name], value, least) + 2e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["transposed", "every second", "expanded"])
def test_gradients_of_tokens_that_are_not_contiguous(make_lively: Maker, dtype: torch.dtype, layout: str) -> None:
    """torch's compiler alone gets them wrong: a block's tokens are made contiguous first."""
    network = make_lively(dtype, experts=0, experts_per_token=0)
    block = network.blocks["0"]
    assert isinstance(block, Block)
    memory = torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    views = {
        "transposed": lambda each: each.transpose(1, 2),
        "every second": lambda each: each.flatten().repeat(2).view(3, 16, 64)[:, :, ::2],
        "expanded": lambda each: each[:, :, :1].transpose(1, 2).expand(3, 16, 32),
    }
    condition_BD = torch.randn(3, 32, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
    weight_BTD = torch.linspace(-1, 1, 3 * 16 * 32).view(3, 16, 32).to(dtype)
    found = []
    for compute in (lambda *given: block(*given), compiled_blocks(with_gradients=True)):
        leaf = memory.clone().requires_grad_()
        x_BTD = views[layout](leaf)
        assert not x_BTD.is_contiguous()
        arguments = (block, x_BTD, condition_BD) if found else (x_BTD, condition_BD)
        out_BTD = compute(*arguments)
        # A gradient that is not contiguous either.
        given = weight_BTD.transpose(1, 2).contiguous().transpose(1, 2)
        parameters = list(block.parameters())
        found.append((out_BTD, *torch.autograd.grad(out_BTD, (leaf, condition_BD, *parameters), given)))
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    for with_code, without in zip(found[1], found[0], strict=True):
        assert error(with_code, without) < bound
