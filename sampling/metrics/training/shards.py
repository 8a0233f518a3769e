"""Gradients of a batch in shards, each in one thread of a CPU: sums do not tell how many threads there were."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from ditmoe.model.threads import MOST_THREADS, map_in_threads

SHARD_ROWS: Final = 32
"""Of a shard at least, on a CPU; a GPU takes a batch as a whole."""


def set_gradients(
    parameters: Sequence[nn.Parameter], rows: int, loss_of: Callable[[slice], Tensor], device: torch.device
) -> float:
    """Set the gradients of a loss that is a sum over the rows of a batch; the loss.

    Args:
        rows: of the batch, at least 1.
        loss_of: the part of the loss that some rows have; called in several threads.
        device: that it is computed on.
    """
    shards = max(1, min(MOST_THREADS, rows // SHARD_ROWS)) if device.type == "cpu" else 1
    ends = [rows * shard // shards for shard in range(shards + 1)]

    def of_shard(shard: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = loss_of(slice(ends[shard], ends[shard + 1]))
        return loss.detach(), torch.autograd.grad(loss, parameters)

    found = map_in_threads(of_shard, range(shards), device)
    total, gradients = found[0][0], list(found[0][1])
    for loss, others in found[1:]:
        total = total + loss
        for gradient, other in zip(gradients, others, strict=True):
            gradient += other
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return total.item()
