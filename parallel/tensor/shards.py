"""How tensor ranks share a parameter: which block of the whole each of them holds.

A `TensorShard` is kept on the parameter itself, so that whoever meets the parameter later (the clipping of
gradients, checkpoints) knows that it is a part, and of what. A parameter without one is whole, and the same on
every tensor rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe.parallel.boxes import Placement, column_slice, row_slices

_ATTRIBUTE = "ditmoe_shard"


@dataclass(frozen=True)
class TensorShard:
    """One tensor rank's part of a parameter, cut along one dim.

    The dim is made of `stacked` equal stretches, each dealt out evenly to the ranks: 3 for the rows of a fused
    query-key-value map, of which a rank holds its heads' queries, then their keys, then their values.
    """

    dim: int
    """Counted from the last one, −1: so it is the same for one expert as for all of them stacked."""
    rank: int
    ranks: int
    stacked: int = 1

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, a copy."""
        length = whole.shape[self.dim] // (self.stacked * self.ranks)
        return torch.cat(torch.split(whole, length, self.dim)[self.rank :: self.ranks], self.dim)

    def part_shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this rank's part of a tensor of this shape."""
        cut = len(whole) + self.dim
        return (*whole[:cut], whole[cut] // self.ranks, *whole[cut + 1 :])

    def whole_shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor that a part of this shape was taken from."""
        cut = len(part) + self.dim
        return (*part[:cut], part[cut] * self.ranks, *part[cut + 1 :])

    def placement(self, whole: tuple[int, ...]) -> Placement:
        """Where this rank's part lies in a canonical parameter of this shape, as checkpoints see it."""
        if self.dim == -len(whole):
            return row_slices(whole, self.rank, self.ranks, self.stacked)
        assert self.stacked == 1
        return column_slice(whole, self.rank, self.ranks)


def mark(parameter: Tensor, shard: TensorShard) -> None:
    """Say of a parameter that it is a part.

    `tensor_model_parallel` is how megatron-core and DeepSpeed tell parts, whose squares all count in the
    gradient's norm, from copies, which count once.
    """
    setattr(parameter, _ATTRIBUTE, shard)
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def shard_of(parameter: Tensor) -> TensorShard | None:
    """Which part a parameter is; None where it is whole on every tensor rank."""
    shard: TensorShard | None = getattr(parameter, _ATTRIBUTE, None)
    return shard
