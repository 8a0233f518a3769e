"""Initial values of what a rank keeps: those of the whole, cut as the layout cuts, and no others are made."""

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
from ditmoe.parallel.engine.initial import WholeValues
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.start.begin import begun
from ditmoe.parallel.start.fresh import Fresh
from ditmoe.parallel.tensor.shards import TensorShard, mark

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


class Held(nn.Module):
    """What a rank has of a network: `[name, parameter]` pairs as DeepSpeed leaves them."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__()
        self.pairs = pairs

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.pairs)

    def parameters(self, *_: Any, **__: Any) -> Any:
        return (parameter for _, parameter in self.pairs)


def cut(shape: tuple[int, ...], rank: int, ranks: int) -> Any:
    """A parameter of ZeRO 3: this rank's part of it, filled up for the last rank. None of its numbers may stay."""
    length = -(-torch.Size(shape).numel() // ranks)
    part = torch.full((length,), 7.0)
    return SimpleNamespace(shape=(0,), ds_shape=shape, ds_tensor=part, ds_zero_partition_rank=rank)


def at(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(initial.dist, "get_rank", lambda: rank)


def layout(**axes: int) -> Layout:
    defaults = {"pipe": 1, "data": 1, "expert": 1, "tensor": 1, "zero": 3, "micro_batch": 1, "accumulation": 1}
    return Layout(**{**defaults, **axes})


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 3]), st.integers(1, 5))
def test_all_ranks_together_have_the_whole(expert: int, copies: int) -> None:
    """ZeRO 3 over any number of ranks, with experts dealt out or not; bit for bit, and zeros behind the end."""
    network = DiT(CONFIG)
    initialise(network, seed=3)
    expected = canonical_state(network)
    grid = layout(data=expert * copies, expert=expert)
    made: dict[str, list[Tensor]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(expert * copies):
            at(patch, rank)
            pairs = []
            for name, parameter in network.named_parameters():
                shape, place, ranks = tuple(parameter.shape), rank, expert * copies
                if ".experts." in name:
                    shape, place, ranks = (shape[0] // expert, *shape[1:]), rank // expert, copies
                    # DeepSpeed's layer has other names.
                    for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                        name = name.replace(ours, theirs)
                pairs.append((name, cut(shape, place, ranks)))
            initial.fill(Held(pairs), grid, Fresh(3))
            for name, parameter in pairs:
                group = f"{name}/{rank % expert if '.experts.' in name else 0}"
                made.setdefault(group, []).append(parameter.ds_tensor)
    whole = {name: torch.cat(parts) for name, parts in made.items()}
    for name, parameter in network.named_parameters():
        if ".experts." not in name:
            found = whole[f"{name}/0"]
            size = parameter.numel()
            assert torch.equal(found[:size], expected[name].flatten()) and not found[size:].any()
    for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        for part in range(expert):
            held = CONFIG.experts // expert
            numbers = range(part * held, (part + 1) * held)
            values = torch.cat([expected[f"blocks.0.moe.experts.{n}.{ours}.weight"].flatten() for n in numbers])
            found = whole[f"blocks.0.moe.experts.{theirs}/{part}"]
            assert torch.equal(found[: len(values)], values) and not found[len(values) :].any()


def test_only_what_is_kept_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        asked.append((name, shape))
        return initial_value(name, shape, seed=0)

    at(monkeypatch, 3)  # of 4: the second half of the experts, and of these the second copy
    pair = ("blocks.0.moe.experts.w3", cut((3, 4, 5), rank=1, ranks=2))
    initial.fill(Held([pair]), layout(data=4, expert=2), WholeValues(value))
    numbers = sorted(int(name.split(".")[4]) for name, _ in asked)
    assert numbers == [4, 5] and {shape for _, shape in asked} == {(4, 5)}
    whole = torch.stack([initial_value(f"blocks.0.moe.experts.{n}.up_proj.weight", (4, 5), 0) for n in (3, 4, 5)])
    assert torch.equal(pair[1].ds_tensor, whole.flatten()[30:])

    asked.clear()
    initial.fill(Held([pair]), layout(data=4, expert=2), None)
    assert not asked and not pair[1].ds_tensor.any()


def test_tensor_ranks_keep_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole's value, and of that part what ZeRO 3 leaves the rank; what a thread raises is raised."""
    at(monkeypatch, 0)
    name, shape, shard = "blocks.0.attn.qkv.weight", (12, 4), TensorShard(-2, 1, 2, 3)
    parameter: Any = cut(shard.part_shape(shape), rank=1, ranks=2)
    mark(parameter, shard)
    initial.fill(Held([(name, parameter)]), layout(data=2, tensor=2), Fresh(1))
    part = shard.take(initial_value(name, shape, seed=1))
    assert torch.equal(parameter.ds_tensor, part.flatten()[12:])

    def fails(name: str, shape: tuple[int, ...]) -> Tensor:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        initial.fill(Held([(name, parameter)]), layout(data=2, tensor=2), WholeValues(fails))


def test_memory_is_given_on_the_cpu_and_positions_are_there() -> None:
    with torch.device("meta"):
        network = DiT(CONFIG)
    mark(network.blocks["0"].attn.qkv.weight, TensorShard(-2, 0, 2, 3))
    initial.give_memory(network, torch.bfloat16, torch.device("cpu"))
    assert {(p.device.type, p.dtype) for p in network.parameters()} == {("cpu", torch.bfloat16)}
    assert initial.shard_of(network.blocks["0"].attn.qkv.weight) == TensorShard(-2, 0, 2, 3)
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
