"""The network: shapes, names, initial values, and what adaLN-Zero promises."""

from collections.abc import Callable

import pytest
import torch

from ditmoe.model.canonical import canonical_shapes, canonical_state, load_canonical
from ditmoe.model.dit import DiT, balance_losses
from ditmoe.model.errors import UserError
from ditmoe.model.initialise import initial_value, initialise
from ditmoe.model.layers import position_embedding

Maker = Callable[..., DiT]


@pytest.mark.parametrize("attention", ["plain", "qk_norm"])
@pytest.mark.parametrize(("size", "channels", "patch", "experts"), [(8, 1, 2, 4), (12, 4, 4, 0), (6, 3, 1, 3)])
def test_any_input(
    make_network: Maker, size: int, channels: int, patch: int, experts: int, attention: str
) -> None:
    network = make_network(
        image_size=size,
        channels=channels,
        patch=patch,
        experts=experts,
        experts_per_token=min(experts, 2),
        attention=attention,
    )
    x_BCHW = torch.randn(3, channels, size, size)
    out = network(x_BCHW, torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 5]))
    assert out.shape == (3, 2 * channels, size, size)
    assert out.dtype == torch.float32
    assert len(balance_losses(network)) == (2 if experts else 0)


def test_a_new_network_puts_out_zero_and_every_parameter_can_learn(make_network: Maker) -> None:
    network = make_network()
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.7]), torch.tensor([1, 2])
    assert not network(*inputs).any()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    network(*inputs).square().mean().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def test_recomputation_gives_the_same_gradients(make_network: Maker) -> None:
    network = make_network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.7]), torch.tensor([1, 2])
    gradients = []
    for network.checkpoint_blocks in (False, True):
        network.zero_grad()
        network(*inputs).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)  # type: ignore[arg-type]


def test_tokens_and_patches_are_inverse(make_network: Maker) -> None:
    """The final layer's patches, read back row by row, land where the patch embedding takes them from."""
    network = make_network(learn_sigma=False)
    x_BCHW = torch.arange(2 * 3 * 64, dtype=torch.float32).view(2, 3, 8, 8)
    patches = x_BCHW.unfold(2, 2, 2).unfold(3, 2, 2)  # B, C, rows, columns, 2, 2
    tokens = patches.permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 12)
    assert torch.equal(network._unpatchify(tokens), x_BCHW)


def test_position_embedding_separates_rows_and_columns() -> None:
    grid = position_embedding(32, 6).view(6, 6, 32)
    assert torch.equal(grid[2, 3, :16], grid[5, 3, :16]), "the first half depends on the column alone"
    assert torch.equal(grid[2, 3, 16:], grid[2, 0, 16:]), "the second half depends on the row alone"
    assert len(grid.view(36, 32).unique(dim=0)) == 36
    torch.testing.assert_close(grid[0, 1, 0], torch.tensor(1.0).sin())


def test_initial_values_depend_on_seed_and_name_alone(make_network: Maker) -> None:
    small, large = make_network(), make_network(depth=4, experts=8)
    states = canonical_state(small), canonical_state(large)
    for name, tensor in states[0].items():
        if "moe.gate" not in name:
            assert torch.equal(tensor, states[1][name]), name
    first, second = (states[0][f"blocks.0.moe.experts.{expert}.up_proj.weight"] for expert in (0, 1))
    assert not torch.equal(first, second)
    initialise(large, seed=1)
    assert not torch.equal(
        canonical_state(large)["blocks.0.attn.qkv.weight"], states[0]["blocks.0.attn.qkv.weight"]
    )


def test_initial_distributions() -> None:
    linear = initial_value("blocks.0.attn.proj.weight", (300, 500), 0)
    assert linear.abs().max() <= (6 / 800) ** 0.5
    assert linear.std().item() == pytest.approx((6 / 800 / 3) ** 0.5, rel=0.02)
    convolution = initial_value("x_embedder.proj.weight", (384, 4, 2, 2), 0)
    assert convolution.std().item() == pytest.approx((6 / 400 / 3) ** 0.5, rel=0.05)
    assert initial_value("blocks.0.moe.gate.weight", (8, 400), 0).abs().max() <= 1 / 20
    assert initial_value("t_embedder.mlp.0.weight", (400, 256), 0).std().item() == pytest.approx(0.02, rel=0.02)
    assert not initial_value("blocks.1.adaLN_modulation.1.weight", (12, 2), 0).any()
    assert not initial_value("final_layer.linear.weight", (12, 2), 0).any()
    assert initial_value("blocks.1.attn.q_norm.weight", (4,), 0).eq(1).all()


def test_canonical_names_and_strict_loading(make_network: Maker) -> None:
    network = make_network()
    state = {name: tensor.clone() for name, tensor in canonical_state(network).items()}
    assert canonical_shapes(network.config) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert state["blocks.1.moe.experts.3.gate_proj.weight"].shape == (128, 32)
    other = make_network()
    initialise(other, seed=7)
    load_canonical(other, state, "memory")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))

    del state["y_embedder.embedding_table.weight"]
    state["extra"] = torch.zeros(1)
    state["blocks.0.attn.qkv.bias"] = torch.zeros(5)
    with pytest.raises(UserError) as error:
        load_canonical(other, state, "file.pt")
    for part in (
        "file.pt",
        "1 missing: y_embedder",
        "1 unknown: extra",
        "blocks.0.attn.qkv.bias is (5,), expected",
    ):
        assert part in str(error.value)
