"""Drawing on a GPU, which is pretended: what it computes, and that no step of it makes the host wait."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.dit import DiT
from ditmoe.sampling.drawing.generate import draw
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.integrators.samplers import SAMPLERS
from ditmoe.sampling.network.denoiser import make_denoiser
from ditmoe.sampling.settings.config import SamplerConfig
from tests.pretend.gpu import Gpu, pretended_gpu

MODEL = ModelConfig(
    depth=1,
    hidden=32,
    heads=4,
    patch=2,
    experts=4,
    experts_per_token=2,
    image_size=8,
    channels=1,
    num_classes=10,
)
OWN_STEPS = "rk45"
"""Looks at each step's error before it takes the next one."""


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretended_gpu() as found:
        yield found


@torch.inference_mode()
def drawn(device: torch.device, kind: Any, settings: dict[str, Any]) -> Tensor:
    """Three images by a network of fixed weights."""
    objective = ObjectiveConfig(kind=kind)
    torch.manual_seed(0)
    network = DiT(MODEL.model_copy(update={"learn_sigma": kind == "ddpm"})).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    network.to(device)
    config = SamplerConfig(**settings).resolved(objective)
    noise = ImageNoise(0, [0, 1, 2], (1, 8, 8), device)
    label_B = torch.arange(3, device=device)
    return draw(make_denoiser(network, MODEL, objective, config), label_B, noise.initial(), noise, config).x_BCHW


@pytest.mark.parametrize("kind", ["ddpm", "rectified_flow"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != OWN_STEPS])
def test_no_step_waits(gpu: Gpu, kind: str, sampler: str) -> None:
    """However many there are, the host waits as often."""
    waits = []
    for steps in (3, 6):
        settings = {"sampler": sampler, "steps": steps, "cfg_scale": 2.0}
        before = gpu.waits.copy()
        found = drawn(gpu.device, kind, settings)
        waits.append(gpu.waits - before)
        assert found.device == gpu.device
        expected = drawn(torch.device("cpu"), kind, settings)
        assert torch.allclose(found.cpu(), expected, rtol=1e-3, atol=1e-3)
        gpu.waits.clear()
    assert waits[0] == waits[1], waits
