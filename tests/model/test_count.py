"""Parameters and FLOPs against the published tables and against torch's own counter."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditmoe.model.canonical import canonical_shapes
from ditmoe.model.config import ModelConfig
from ditmoe.model.count import count, family, flops_per_image, preset_config
from ditmoe.model.dit import DiT
from ditmoe.model.initialise import initialise
from ditmoe.model.presets import PUBLISHED

TINY: dict[str, Any] = {
    "depth": 2,
    "hidden": 32,
    "heads": 4,
    "patch": 2,
    "image_size": 8,
    "channels": 3,
    "num_classes": 5,
}

# arXiv 2407.11633, Table 1: total and activated, each with the unit of its last printed digit.
PUBLISHED_PARAMETERS = {
    "DiT-S/2-8E2A": (199e6, 71e6, 1e6, 1e6),
    "DiT-S/2-16E2A": (369e6, 71e6, 1e6, 1e6),
    "DiT-B/2-8E2A": (795e6, 286e6, 1e6, 1e6),
    "DiT-L/2-8E2A": (2.8e9, 1.0e9, 0.1e9, 0.1e9),
    "DiT-XL/2-8E2A": (4.1e9, 1.5e9, 0.1e9, 0.1e9),
    "DiT-G/2-16E2A": (16.5e9, 3.1e9, 0.1e9, 0.1e9),
}

# arXiv 2212.09748, Table 4 (256²) and Table 2 (512²): millions of parameters and "Gflops" (multiply-accumulates).
DENSE = {
    "DiT-S/8": (33, 0.36),
    "DiT-S/4": (33, 1.41),
    "DiT-S/2": (33, 6.06),
    "DiT-B/8": (131, 1.42),
    "DiT-B/4": (130, 5.56),
    "DiT-B/2": (130, 23.01),
    "DiT-L/8": (459, 5.01),
    "DiT-L/4": (458, 19.70),
    "DiT-L/2": (458, 80.71),
    "DiT-XL/8": (676, 7.39),
    "DiT-XL/4": (675, 29.05),
    "DiT-XL/2": (675, 118.64),
}


def test_every_published_network_is_in_the_table() -> None:
    assert set(PUBLISHED_PARAMETERS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameters_agree_with_the_published_table(name: str) -> None:
    """The paper cuts some figures and rounds others: exact ones lie within one unit of the last printed digit."""
    total, activated, total_unit, activated_unit = PUBLISHED_PARAMETERS[name]
    counted = count(preset_config(name))
    assert abs(counted.total - total) < total_unit
    assert abs(counted.activated - activated) < activated_unit


def test_exact_figures_of_the_largest() -> None:
    """By hand, for depth L = 40, hidden D = 1408, N = 16 experts, K = 2, 1000 classes, 4 channels, patch 2."""
    depth, d = 40, 1408
    attention = 3 * d * d + 3 * d + d * d + d + 4 * (d // 16)
    block = attention + 6 * d * d + 6 * d + 16 * d + 3 * 2 * d * d  # + adaLN, router, shared experts
    rest = (16 * d + d) + (256 * d + d + d * d + d) + 1001 * d + (32 * d + 32) + (2 * d * d + 2 * d)
    counted = count(preset_config("DiT-G/2-16E2A"))
    assert counted.total == depth * (block + 16 * 12 * d * d) + rest == 16_503_370_784
    assert counted.activated == depth * (block + 2 * 12 * d * d) + rest == 3_181_212_704


@pytest.mark.parametrize("name", DENSE)
def test_dense_networks_agree_with_the_published_table(name: str) -> None:
    millions, gmacs = DENSE[name]
    counted = count(preset_config(name))
    assert round(counted.total / 1e6) == millions
    assert counted.activated == counted.total
    assert counted.macs / 1e9 == pytest.approx(gmacs, abs=0.006, rel=0.0003)


def test_dense_network_at_512() -> None:
    assert count(preset_config("DiT-XL/2", 512)).macs / 1e9 == pytest.approx(524.60, rel=0.0003)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"attention": "qk_norm", "learn_sigma": False},
        {"experts": 4, "experts_per_token": 2},
        {"experts": 3, "experts_per_token": 3, "shared_experts": 0, "attention": "qk_norm"},
    ],
    ids=["dense", "dense-qk_norm", "experts", "no-shared"],
)
def test_flops_equal_those_that_torch_counts(shape: dict[str, Any]) -> None:
    config = ModelConfig(**TINY, **shape)
    network = DiT(config)
    initialise(network, seed=0)
    images = 3
    x_BCHW = torch.randn(images, 3, 8, 8)
    # The counter knows neither the CPU's fused attention kernel nor oneDNN's products, and plain ones it does.
    # With gradients, as in training: at inference experts take blocks that are filled up with zeros.
    known = torch.backends.mkldnn.flags(enabled=False)  # type: ignore[no-untyped-call]
    with known, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(x_BCHW, torch.zeros(images), torch.zeros(images, dtype=torch.long))
    assert counter.get_total_flops() == images * flops_per_image(config)


def test_total_is_what_a_file_would_hold() -> None:
    config = ModelConfig(**TINY, experts=4, experts_per_token=1)
    shapes = canonical_shapes(config)
    del shapes["pos_embed"]
    assert count(config).total == sum(torch.Size(shape).numel() for shape in shapes.values())


def test_activated_is_the_total_when_every_expert_is_chosen() -> None:
    counted = count(ModelConfig(**TINY, experts=4, experts_per_token=4))
    assert counted.activated == counted.total


def test_family_holds_the_published_ones_once() -> None:
    names = family()
    assert len(names) == len(set(names))
    assert set(PUBLISHED) <= set(names)
    assert "DiT-XL/8" in names and "DiT-B/4-8E2A" in names and "DiT-G/4-16E2A" not in names
