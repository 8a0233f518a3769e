"""Initial values of what a rank keeps: those of the whole, cut as the layout cuts, and no others are made."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ditmoe.model.canonical import canonical_state
from ditmoe.model.config import ModelConfig
from ditmoe.model.dit import DiT
from ditmoe.model.initialise import initial_value, initialise
from ditmoe.parallel.checkpoint.folder import checkpoint_path
from ditmoe.parallel.engine import initial
from ditmoe.parallel.engine.fragments import Fragment
from ditmoe.parallel.engine.initial import WholeValues
from ditmoe.parallel.start.begin import begun
from ditmoe.parallel.start.fresh import Fresh
from ditmoe.parallel.tensor.shards import TensorShard, mark, shard_of

CONFIG = ModelConfig(
    depth=1,
    hidden=8,
    heads=2,
    patch=2,
    experts=6,
    experts_per_token=2,
    image_size=4,
    channels=1,
    num_classes=2,
)


def owned(
    name: str, shape: tuple[int, ...], start: int, length: int, shard: TensorShard | None = None
) -> Fragment:
    """What an optimiser owns of a parameter, or of a tensor rank's part of it. None of its numbers may stay."""
    weight = torch.full((length,), 7.0)
    return Fragment(name, shape, start, weight, {}, weight, placement=shard and shard.placement(shape))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=5))
def test_all_ranks_together_have_the_whole(cuts: list[float]) -> None:
    """However the optimiser's weights are cut: those of the whole network, bit for bit."""
    network = DiT(CONFIG)
    initialise(network, seed=3)
    for name, expected in canonical_state(network).items():
        if name == "pos_embed":
            continue
        size = expected.numel()
        bounds = sorted({0, size, *(int(cut * size) for cut in cuts)})
        parts = [owned(name, tuple(expected.shape), a, b - a) for a, b in pairwise(bounds)]
        for part in parts:
            initial.fill([part], Fresh(3))
        assert torch.equal(torch.cat([part.weight for part in parts]), expected.flatten())


def test_only_what_is_kept_is_made() -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        asked.append((name, shape))
        return initial_value(name, shape, seed=0)

    kept = [owned(f"blocks.0.moe.experts.{n}.up_proj.weight", (4, 5), 10 * (n == 4), 10) for n in (4, 5)]
    initial.fill(kept, WholeValues(value))
    assert sorted(asked) == [(part.name, (4, 5)) for part in kept]
    for part in kept:
        assert torch.equal(part.weight, initial_value(part.name, (4, 5), 0).flatten()[part.start :][:10])


def test_tensor_ranks_keep_their_parts() -> None:
    """Of the whole's value, and of that part what the optimiser owns; what a thread raises is raised."""
    name, shape, shard = "blocks.0.attn.qkv.weight", (12, 4), TensorShard(-2, 1, 2, 3)
    kept = owned(name, shape, 12, 12, shard)
    initial.fill([kept], Fresh(1))
    part = shard.take(initial_value(name, shape, seed=1))
    assert torch.equal(kept.weight, part.flatten()[12:])

    def fails(name: str, shape: tuple[int, ...]) -> Tensor:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        initial.fill([kept], WholeValues(fails))


def test_zeros_take_the_place_of_everything_that_a_rank_holds() -> None:
    """Of what ZeRO 3 has cut the part, with what fills it up."""
    whole: Any = nn.Linear(3, 2)
    cut = SimpleNamespace(shape=(0,), ds_tensor=torch.full((4,), torch.nan))
    initial.give_zeros(SimpleNamespace(parameters=lambda: [*whole.parameters(), cut]))  # type: ignore[arg-type]
    assert not any(bool(parameter.any()) for parameter in whole.parameters()) and not cut.ds_tensor.any()


def test_memory_is_given_on_the_cpu_and_positions_are_there() -> None:
    with torch.device("meta"):
        network = DiT(CONFIG)
    mark(network.blocks["0"].attn.qkv.weight, TensorShard(-2, 0, 2, 3))
    initial.give_memory(network, torch.bfloat16, torch.device("cpu"))
    assert {(p.device.type, p.dtype) for p in network.parameters()} == {("cpu", torch.bfloat16)}
    assert shard_of(network.blocks["0"].attn.qkv.weight) == TensorShard(-2, 0, 2, 3)
    assert torch.equal(network.pos_embed, DiT(CONFIG).pos_embed)


@pytest.mark.parametrize("resumes", [False, True])
def test_a_resume_makes_no_values(tmp_path: Path, resumes: bool) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if resumes:
        checkpoint_path(tmp_path, 5).mkdir(parents=True)
    try:
        with begun(tmp_path, None, seed=0) as beginning:
            assert (beginning.initial is None) == resumes and beginning.lines == ()
    finally:
        dist.destroy_process_group()
