"""Initial weights on a layout: each rank makes what it holds, one parameter after the other.

A network is built without values, which on a CPU takes no memory until something is written; the layers are shared
out over ranks, and only then filled. So no rank ever holds the experts of the others.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditmoe.model.canonical import split_experts
from ditmoe.parallel.engine.fragments import published_name
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.tensor.shards import shard_of

Initial = Callable[[str, tuple[int, ...]], Tensor]
"""Name and shape of a canonical parameter → its value; the same on every rank."""


@torch.no_grad()
def fill(network: nn.Module, layout: Layout, initial: Initial) -> None:
    """Give every parameter that this rank holds, or its part of it, the initial value of its canonical name."""
    expert_rank = layout.expert_rank(dist.get_rank())
    for name, parameter in network.named_parameters():
        shard = shard_of(parameter)
        for canonical, held in canonical_parts(published_name(name), parameter, expert_rank):
            if shard is None:
                held.copy_(initial(canonical, tuple(held.shape)))
            else:
                held.copy_(shard.take(initial(canonical, shard.whole_shape(tuple(held.shape)))))


def canonical_parts(name: str, parameter: Tensor, expert_rank: int) -> Iterator[tuple[str, Tensor]]:
    """A parameter as this rank holds it, or each of its experts, by canonical name."""
    experts = split_experts(name, expert_rank * parameter.shape[0], parameter.shape[0])
    if experts is None:
        yield name, parameter
    else:
        yield from zip(experts, parameter, strict=True)
