"""Tiny networks."""

from collections.abc import Callable
from typing import Any

import pytest

from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.model.initialise import initialise

TINY: dict[str, Any] = {
    "depth": 2,
    "hidden": 32,
    "heads": 4,
    "patch": 2,
    "experts": 4,
    "experts_per_token": 2,
    "image_size": 8,
    "channels": 3,
    "num_classes": 5,
}


@pytest.fixture
def make_network() -> Callable[..., DiT]:
    """A tiny initialised network, with fields changed as given."""

    def make(**changes: Any) -> DiT:
        network = DiT(ModelConfig(**{**TINY, **changes}))
        initialise(network, seed=0)
        return network

    return make
