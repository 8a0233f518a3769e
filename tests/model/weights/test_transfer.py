"""A network's first values from another's weights: the same function wherever there is a place for all of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ditmoe.model import randomness
from ditmoe.model.canonical import canonical_shapes, canonical_state, load_canonical
from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.model.errors import UserError
from ditmoe.model.initialise import initial_value
from ditmoe.model.weights.transfer import LABELS, listed, plan_transfer
from tests.model.weights.whole_transfer import transferred


def config(**changes: Any) -> ModelConfig:
    shape = {"depth": 2, "hidden": 32, "heads": 4, "patch": 2, "image_size": 8, "channels": 1, "num_classes": 10}
    mixture = {"experts": 4, "experts_per_token": 2}
    return ModelConfig(**{**shape, **mixture, **changes})


DENSE = {"experts": 0, "experts_per_token": 0}
SINGLE = {"experts": 1, "experts_per_token": 1}


def network_of(model: ModelConfig) -> DiT:
    """A network whose every parameter matters: none is zero."""
    network = DiT(model).eval()
    with torch.no_grad():
        for name, tensor in canonical_state(network).items():
            if name != "pos_embed":
                tensor.copy_(0.2 * randomness.normal(5, name, [0], tuple(tensor.shape))[0])
    return network


def started(source: DiT, target: ModelConfig) -> DiT:
    """The network of a configuration, as it starts from another."""
    state = canonical_state(source)
    values = plan_transfer(source.config, target, "source")
    initial = transferred(values, state.__getitem__, lambda name, shape: initial_value(name, shape, seed=3))
    shapes = {name: shape for name, shape in canonical_shapes(target).items() if name != "pos_embed"}
    network = DiT(target).eval()
    load_canonical(network, {name: initial(name, shape) for name, shape in shapes.items()}, "start")
    return network


def output(network: DiT, label: int = 3) -> Tensor:
    side = network.config.image_size
    assert side is not None
    x_BCHW = torch.linspace(-1, 1, 2 * side * side).view(2, 1, side, side)
    with torch.no_grad():
        return network(x_BCHW, torch.tensor([0.2, 0.7]), torch.tensor([label, label]))


@pytest.mark.parametrize(
    ("source", "target", "exact"),
    [
        ({}, {}, True),
        (DENSE, DENSE, True),
        (DENSE, {"shared_mlp": "gelu"}, True),
        (SINGLE, {}, False),
        (SINGLE, {"experts": 3, "experts_per_token": 1, "shared_experts": 4}, False),
        ({"shared_experts": 1}, {"shared_experts": 3}, True),
        ({"shared_experts": 0}, {"shared_experts": 2}, True),
        ({"shared_mlp": "gelu"}, {"shared_mlp": "gelu"}, True),
    ],
)
def test_the_function_is_the_source_s(source: dict[str, Any], target: dict[str, Any], exact: bool) -> None:
    """Exactly, to rounding; from one expert to the 1e-4 by which the small router's scores differ."""
    network = network_of(config(**source))
    begun = started(network, config(**target))
    torch.testing.assert_close(output(begun), output(network), rtol=0, atol=1e-5 if exact else 2e-3)
    assert output(network).abs().max() > 1


def test_experts_of_one_get_tokens_and_differ_after_a_step() -> None:
    """The router is small and not zero: tokens go to all experts, which therefore do not stay copies."""
    network = started(network_of(config(**SINGLE)), config())
    network.train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    x_BCHW = randomness.normal(1, "image", range(16), (1, 8, 8))
    network(x_BCHW, torch.linspace(0, 1, 16), torch.arange(16) % 10).square().mean().backward()
    optimiser.step()
    layers = [block.moe for block in network.blocks.values()]  # type: ignore[union-attr]
    for layer in layers:
        load_N = layer.balance.last_load_N  # type: ignore[union-attr]
        assert load_N is not None and (load_N > 0).sum() >= 3, load_N
        down = layer.experts.down_proj.detach()  # type: ignore[union-attr]
        assert (down[0] - down[1]).abs().max() > 1e-4


def test_other_classes_keep_the_null_class_and_another_grid_has_its_own_positions() -> None:
    source = network_of(config())
    begun = started(source, config(num_classes=4, image_size=12))
    own, from_source = canonical_state(begun), canonical_state(source)
    assert own[LABELS].shape == (5, 32)
    assert torch.equal(own[LABELS][-1], from_source[LABELS][-1])
    assert own[LABELS][:-1].abs().max() < 0.2  # drawn anew, of deviation 0.02
    assert torch.equal(own["pos_embed"], DiT(config(image_size=12)).pos_embed)
    for name, tensor in own.items():
        assert name in (LABELS, "pos_embed") or torch.equal(tensor, from_source[name])
    torch.testing.assert_close(
        output(started(source, config(num_classes=4)), label=4), output(source, label=10), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("source", "target", "problems"),
    [
        ({"hidden": 16}, {}, ["model.hidden = 32, found hidden = 16", "(16, 1, 2, 2), expected (32, 1, 2, 2)"]),
        ({"depth": 1}, {}, ["model.depth = 2, found depth = 1", "blocks.1.attn.qkv.weight is not found"]),
        (
            {"heads": 2, "channels": 3},
            {},
            ["model.heads = 4, found heads = 2", "model.channels = 1", "(32, 3, 2, 2)"],
        ),
        (
            {"experts": 8},
            {},
            ["model.experts = 4, found experts = 8", "moe.gate.weight is (8, 32), expected (4, 32)"],
        ),
        ({"shared_experts": 3}, {}, ["model.shared_experts = 2, found shared_experts = 3"]),
        (DENSE, {}, ["expected model.shared_mlp = gelu"]),
        (SINGLE, DENSE, ["model.experts = 0, found experts = 1"]),
        ({"shared_mlp": "gelu"}, {}, ["model.shared_mlp = swiglu, found shared_mlp = gelu"]),
        (
            {"attention": "qk_norm", "learn_sigma": False},
            {},
            ["model.attention = plain", "model.learn_sigma = True"],
        ),
    ],
)
def test_what_does_not_fit_is_one_message(
    source: dict[str, Any], target: dict[str, Any], problems: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        plan_transfer(config(**source), config(**target), "some.pt")
    text = str(caught.value)
    assert text.startswith("train.start_from = some.pt: its weights do not fit the model:\n")
    for problem in problems:
        assert problem in text, text
    assert len(text.splitlines()) < 12


def test_names_that_differ_in_numbers_alone_are_listed_as_one() -> None:
    values = plan_transfer(config(**SINGLE), config(num_classes=3), "source")
    parts = [part for name, value in values.items() if (part := value.fresh_part(name)) is not None]
    assert listed(parts) == [
        f"{LABELS} (all but the null class)",
        "blocks.*.moe.gate.weight (0.0001 of its usual size), 2 tensors",
    ]
    assert listed(["blocks.0.moe.experts.1.up_proj.weight", "t_embedder.mlp.0.weight"]) == [
        "blocks.0.moe.experts.1.up_proj.weight",
        "t_embedder.mlp.0.weight",
    ]
