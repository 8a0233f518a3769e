"""Networks whose gates are open, and their gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ditmoe.model.dit import DiT

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def make_lively(make_network: Callable[..., DiT]) -> Callable[..., DiT]:
    """A tiny network in which every parameter makes a difference."""

    def make(dtype: torch.dtype = torch.float32, **changes: Any) -> DiT:
        network = make_network(**changes)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return network.to(dtype)

    return make


@pytest.fixture
def inputs() -> Inputs:
    """Of three images of 8×8."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, 5])


@pytest.fixture
def passes() -> Callable[[DiT, Inputs], dict[str, Tensor]]:
    """Runs both passes of a network; what it predicts, and the gradient of each parameter, float32."""

    def run(network: DiT, inputs: Inputs) -> dict[str, Tensor]:
        network.zero_grad()
        prediction = network(*inputs)
        weight = torch.linspace(-1, 1, prediction.numel()).view_as(prediction)
        (prediction * weight).sum().backward()
        found = {name: parameter.grad for name, parameter in network.named_parameters()}
        assert all(gradient is not None for gradient in found.values())
        return {
            "": prediction.detach(),
            **{name: each.float() for name, each in found.items() if each is not None},
        }

    return run
