"""Counter-based random streams: what is drawn for a sample depends on (seed, purpose, position) alone.

Each (seed, purpose) is a Philox key and each position its own stretch of that key's counter (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), so that ranks, workers and layouts have no say in it.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, purpose: str, position: int) -> np.random.Generator:
    """The random generator of one position (a sample's place in the global order, or an image's number)."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype=np.uint64)
    # The position fills the counter's high words: 2^128 draws lie between two positions.
    counter = np.array([0, 0, position & (2**64 - 1), position >> 64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def normal(seed: int, purpose: str, positions: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal draws, float32 `[len(positions), *shape]`, one stream per position."""
    positions = list(positions)
    out = torch.empty(len(positions), *shape)
    fill_normal(out, seed, purpose, positions)
    return out


def fill_normal(out: Tensor, seed: int, purpose: str, positions: Sequence[int]) -> None:
    """`normal` into memory that is there: contiguous float32 `[len(positions), …]` on the CPU.

    The draws themselves leave Python's lock alone, so that threads may fill different rows side by side.
    """
    rows = out.view(len(positions), math.prod(out.shape[1:])).numpy()
    for row, position in zip(rows, positions, strict=True):
        generator(seed, purpose, position).standard_normal(dtype=np.float32, out=row)


def uniform(seed: int, purpose: str, positions: Iterable[int]) -> Tensor:
    """Uniform draws from [0, 1), float64 `[len(positions)]`."""
    return torch.tensor([generator(seed, purpose, p).random() for p in positions], dtype=torch.float64)


def permutation(seed: int, purpose: str, position: int, n: int) -> np.ndarray:
    """A random order of range(n), int64 `[n]`."""
    return generator(seed, purpose, position).permutation(n)
