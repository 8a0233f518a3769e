"""The global order of samples: position → (epoch, shard, sample in the shard), and nothing else.

Position p belongs to epoch p // total. Each epoch permutes the shards by (seed, epoch), takes them in windows
of `shuffle_shards` neighbours, and permutes the samples of a window together; so every sample comes exactly
once per epoch, a reader needs only one window's shards open, and no rank, worker or start has a say.

Seam: the stream asks an order for `total` and `locate(position)` only. A mixture of sources or an order in
lanes is another class with these two, and its whole state stays one integer, the position.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.model.randomness import permutation


class Place(NamedTuple):
    """Where a position's sample lies."""

    epoch: int
    shard: int
    """Number of the shard in the index."""
    member: int
    """Number of the sample in its shard, in the tar's order."""


class _Window(NamedTuple):
    shards: NDArray[np.int64]
    """Shards of the window."""
    starts: NDArray[np.int64]
    """First sample of each shard in the window's concatenation."""
    samples: NDArray[np.int64]
    """The window's samples, as numbers in the concatenation, in the order in which they come."""


class EpochOrder:
    """Order of the samples of one dataset."""

    def __init__(self, samples_per_shard: Sequence[int], seed: int, shuffle_shards: int) -> None:
        assert samples_per_shard and min(samples_per_shard) > 0 and shuffle_shards > 0
        self.total = int(sum(samples_per_shard))
        self._counts = np.asarray(samples_per_shard, dtype=np.int64)
        self._seed = seed
        self._width = shuffle_shards
        self._windows_per_epoch = -(-len(samples_per_shard) // shuffle_shards)
        # Batches cross from one window to the next, so two are kept; a window is the largest thing in memory.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=2)(self._make_window)

    def locate(self, position: int) -> Place:
        """Where the sample at `position` (≥ 0) lies."""
        epoch, offset = divmod(position, self.total)
        _, window_starts = self._epoch(epoch)
        number = int(np.searchsorted(window_starts, offset, side="right")) - 1
        window = self._window(epoch, number)
        sample = window.samples[offset - window_starts[number]]
        slot = int(np.searchsorted(window.starts, sample, side="right")) - 1
        return Place(epoch, int(window.shards[slot]), int(sample - window.starts[slot]))

    def _make_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's shards in order, and the first offset of each window."""
        shards = permutation(self._seed, "data/shards", epoch, len(self._counts))
        return shards, _starts(np.add.reduceat(self._counts[shards], np.arange(0, len(shards), self._width)))

    def _make_window(self, epoch: int, number: int) -> _Window:
        shards = self._epoch(epoch)[0][number * self._width : (number + 1) * self._width]
        counts = self._counts[shards]
        draw = epoch * self._windows_per_epoch + number
        return _Window(shards, _starts(counts), permutation(self._seed, "data/samples", draw, int(counts.sum())))


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts[:-1])])
