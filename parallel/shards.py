"""How tensor ranks share a parameter: which block of the whole each of them holds.

A `TensorShard` is kept on the parameter itself, so that whoever meets the parameter later (the clipping of
gradients, checkpoints) knows that it is a part, and of what. A parameter without one is whole, and the same on
every tensor rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ATTRIBUTE = "ditmoe_shard"


@dataclass(frozen=True)
class TensorShard:
    """One tensor rank's part of a parameter, cut along one dim.

    The dim is made of `stacked` equal stretches, each dealt out evenly to the ranks: 3 for the rows of a fused
    query-key-value map, of which a rank holds its heads' queries, then their keys, then their values.
    """

    dim: int
    rank: int
    ranks: int
    stacked: int = 1

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, a copy."""
        length = whole.shape[self.dim] // (self.stacked * self.ranks)
        return torch.cat(torch.split(whole, length, self.dim)[self.rank :: self.ranks], self.dim)

    def whole_shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor that a part of this shape was taken from."""
        return (*local[: self.dim], local[self.dim] * self.ranks, *local[self.dim + 1 :])


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
