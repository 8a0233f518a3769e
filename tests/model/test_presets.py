"""Preset names, and the configurations made from them."""

from typing import Any

import pytest
from pydantic import ValidationError

from ditmoe.model.config import ModelConfig
from ditmoe.model.presets import PATCHES, PUBLISHED, SIZES, Preset, folder_name, parse_preset


def test_published_shapes() -> None:
    assert parse_preset("DiT-S/2-8E2A") == Preset(12, 384, 6, 2, 8, 2)
    assert parse_preset("DiT-S/2-16E2A") == Preset(12, 384, 6, 2, 16, 2)
    assert parse_preset("DiT-B/2-8E2A") == Preset(12, 768, 12, 2, 8, 2)
    assert parse_preset("DiT-L/2-8E2A") == Preset(24, 1024, 16, 2, 8, 2)
    assert parse_preset("DiT-XL/2-8E2A") == Preset(28, 1152, 16, 2, 8, 2)
    assert parse_preset("DiT-G/2-16E2A") == Preset(40, 1408, 16, 2, 16, 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", PATCHES)
def test_dense_and_any_mixture(size: str, patch: int) -> None:
    depth, hidden, heads = SIZES[size]
    assert parse_preset(f"DiT-{size}/{patch}") == Preset(depth, hidden, heads, patch, 0, 0)
    assert parse_preset(f"DiT-{size}/{patch}-32E4A") == Preset(depth, hidden, heads, patch, 32, 4)
    assert parse_preset(f"DiT-{size}/{patch}-32e4a") == Preset(depth, hidden, heads, patch, 32, 4)
    assert hidden % heads == 0


@pytest.mark.parametrize(
    "name",
    ["", "DiT-S", "DiT-M/2", "DiT-S/3", "DiT-S/2-8E", "DiT-S/2-8E2A ", "dit-S/2", "DiT-S/2-8E2A/4", "S/2-8E2A"],
)
def test_other_names_are_refused_with_the_form(name: str) -> None:
    with pytest.raises(ValueError, match="expected DiT-SIZE/PATCH"):
        parse_preset(name)


@pytest.mark.parametrize("name", ["DiT-S/2-8E0A", "DiT-S/2-8E9A", "DiT-S/2-0E0A"])
def test_impossible_mixtures_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="1 <= active <= experts"):
        parse_preset(name)


def test_folder_names_have_no_slash() -> None:
    assert [folder_name(name) for name in PUBLISHED[:1]] == ["DiT-S-2-8E2A"]


def test_configuration_takes_what_is_left_out_from_the_preset() -> None:
    config = ModelConfig(preset="DiT-S/2-8E2A", depth=3)
    assert (config.depth, config.hidden, config.heads, config.experts, config.experts_per_token) == (
        3,
        384,
        6,
        8,
        2,
    )


def test_configuration_refuses_an_unknown_preset() -> None:
    with pytest.raises(ValidationError, match="is not a preset"):
        ModelConfig(preset="DiT-Q/2")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"preset": "DiT-S/2-8E2A"}, "DiT-S/2-8E2A"),
        ({"preset": "DiT-S/2"}, "DiT-S/2"),
        ({"preset": "DiT-S/2-8E2A", "depth": 12, "image_size": 8, "learn_sigma": False}, "DiT-S/2-8E2A"),
        ({"preset": "DiT-S/2-8E2A", "depth": 3}, None),
        ({"preset": "DiT-S/2-8E2A", "experts_per_token": 1}, None),
        ({"preset": "DiT-S/2-8E2A", "shared_experts": 1}, None),
        ({"preset": "DiT-S/2-8E2A", "shared_mlp": "gelu"}, None),
        ({"depth": 12, "hidden": 384, "heads": 6, "patch": 2}, None),
    ],
)
def test_only_a_network_of_a_preset_s_shape_has_its_name(fields: dict[str, Any], name: str | None) -> None:
    assert ModelConfig(**fields).published_name == name
