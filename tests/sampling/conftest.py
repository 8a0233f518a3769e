"""What tests of sampling share; they compute with one thread, so that no figure depends on the machine's cores."""

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.model.initialise import initialise
from ditmoe.sampling.network.load import LoadedModel

LivelyModel = Callable[..., LoadedModel]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lively_model() -> LivelyModel:
    """Makes small networks whose zero-initialised layers are filled, so that everything makes a difference."""

    def made(
        kind: Literal["rectified_flow", "ddpm"] = "rectified_flow",
        experts: int = 4,
        hidden: int = 32,
        tokens_across: int = 4,
    ) -> LoadedModel:
        config = ModelConfig(
            depth=2,
            hidden=hidden,
            heads=2,
            patch=2,
            experts=experts,
            experts_per_token=min(2, experts),
            image_size=2 * tokens_across,
            channels=1,
            num_classes=5,
        )
        network = DiT(config)
        initialise(network, 0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        names = tuple(f"class {label}" for label in range(5))
        objective = ObjectiveConfig(kind=kind)
        return LoadedModel(network.requires_grad_(False), config, objective, names, None, "tiny")

    return made
