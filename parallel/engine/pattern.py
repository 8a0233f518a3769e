"""Numbers that distinguish each place of each parameter from every other, to trace what a library does with them.

Place i of the canonical parameter `name` has the number `table[(hash(name) + i) mod length]`. The table is random
and its length a prime number far from any width of a network, so parameters that change places, and runs of one
that are shifted, do not have each other's numbers. All numbers are integers that bfloat16 holds exactly.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ditmoe.model.randomness import generator

LENGTH: Final = 1_048_573
LARGEST: Final = 127
DEVIATION: Final = LARGEST / 3**0.5
"""Standard deviation of the numbers, which are uniform over −127…127."""


@cache
def _table(device: torch.device) -> Tensor:
    """The numbers on a device, float32 `[LENGTH]`."""
    draws = generator(0, "pattern", 0).integers(-LARGEST, LARGEST + 1, LENGTH)
    return torch.from_numpy(draws.astype(np.float32)).to(device)


def stretches(name: str, start: int, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut flat values, which begin at a place of a parameter, into views and the numbers of their places.

    Neither is copied.
    """
    table = _table(values.device)
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    place, done = int.from_bytes(digest) + start, 0
    while done < len(values):
        first = (place + done) % LENGTH
        length = min(len(values) - done, LENGTH - first)
        yield values.narrow(0, done, length), table.narrow(0, first, length)
        done += length


def project(name: str, start: int, values: Tensor) -> Tensor:
    """The sum of each value times its place's number, a float64 scalar: linear in the values."""
    parts = [torch.dot(each.float(), numbers).double() for each, numbers in stretches(name, start, values)]
    return torch.stack(parts).sum()
