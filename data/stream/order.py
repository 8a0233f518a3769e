"""The order of one source's samples: number → (epoch, shard, member), and nothing else.

Number i belongs to epoch i // total. Each epoch permutes the shards by (seed, epoch) and cuts the samples, shard
after shard, into one stretch per lane, as long as the mixture gives the lane turns in this epoch. A lane reads
its stretch from front to back, and permutes every `shuffle` neighbours of it. So each sample comes exactly once
per epoch, whoever reads a lane needs the shards of a few neighbours at a time, any number can be asked for at
once, and no rank, worker or start has a say.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.stream.mixture import Mixture, Numbers
from ditmoe.model.randomness import permutation


class Address(NamedTuple):
    """Where a sample lies."""

    epoch: int
    shard: int
    """Number of the shard in the index."""
    member: int
    """Which of the shard's usable samples it is, from 0, in the tar's order."""
    ahead: tuple[int, ...]
    """Shards that the lane reads now and next: one tuple for all addresses of a window."""


class _Epoch(NamedTuple):
    shards: Numbers
    """The shards in order."""
    starts: Numbers
    """First sample of each of them in the epoch's concatenation, and the total."""
    lane_starts: Numbers
    """First sample of each lane's stretch in it, and the total."""
    before: Numbers
    """Turns that each lane has had in the epochs before."""


class _Window(NamedTuple):
    """Some neighbours of a lane in the order in which they come."""

    shard: Numbers
    member: Numbers
    ahead: tuple[int, ...]


WINDOWS_PER_LANE: Final = 2
"""Windows kept of each lane: a batch may cross from one to the next."""


class SourceOrder:
    """Order of the usable samples of one source.

    Args:
        samples_per_shard: usable samples of each shard of the index; some may have none.
        mixture: when the source's turns come, and in which lane.
        source: its number in the mixture.
        seed: of all permutations.
        shuffle: neighbours of a lane that are permuted together.
    """

    def __init__(
        self, samples_per_shard: Sequence[int], mixture: Mixture, source: int, seed: int, shuffle: int
    ) -> None:
        self._counts = np.asarray(samples_per_shard, dtype=np.int64)
        self._filled = np.flatnonzero(self._counts)
        assert len(self._filled) and shuffle > 0
        self.total = int(self._counts.sum())
        self._mixture, self._source, self._seed, self._shuffle = mixture, source, seed, shuffle
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=WINDOWS_PER_LANE * mixture.lanes)(self._make_window)

    def locate(self, numbers: Numbers) -> list[Address]:
        """Where the samples of some numbers (≥ 0) lie."""
        lanes, turns = self._mixture.lane(self._source, numbers)
        epochs = numbers // self.total
        addresses = []
        for epoch, lane, turn in zip(epochs.tolist(), lanes.tolist(), turns.tolist(), strict=True):
            number, offset = divmod(turn - int(self._epoch(epoch).before[lane]), self._shuffle)
            window = self._window(epoch, lane, number)
            addresses.append(Address(epoch, int(window.shard[offset]), int(window.member[offset]), window.ahead))
        return addresses

    def instead_of(self, address: Address, whole_shard: bool) -> Address:
        """Whose sample stands in for one that cannot be used; a function of that one's address alone.

        The next of the same shard or, where the `whole_shard` cannot be read, the same of the next shard.
        """
        if not whole_shard:
            return address._replace(member=(address.member + 1) % int(self._counts[address.shard]))
        shards = self._epoch(address.epoch).shards
        following = int(shards[(int(np.flatnonzero(shards == address.shard)[0]) + 1) % len(shards)])
        return address._replace(shard=following, member=address.member % int(self._counts[following]))

    def _make_epoch(self, epoch: int) -> _Epoch:
        order = permutation(self._seed, f"data/shards/source {self._source}", epoch, len(self._filled))
        shards = self._filled[order]
        before, after = (
            self._mixture.counts_before(self._source, number * self.total) for number in (epoch, epoch + 1)
        )
        return _Epoch(shards, _starts(self._counts[shards]), _starts(after - before), before)

    def _make_window(self, epoch: int, lane: int, number: int) -> _Window:
        facts = self._epoch(epoch)
        stretch_end = int(facts.lane_starts[lane + 1])
        first = int(facts.lane_starts[lane]) + number * self._shuffle
        end = min(first + self._shuffle, stretch_end)
        draw = (epoch << 64) + (lane << 32) + number
        order = permutation(self._seed, f"data/samples/source {self._source}", draw, end - first)
        slot = np.searchsorted(facts.starts, np.arange(first, end), side="right") - 1
        shard, member = facts.shards[slot], np.arange(first, end) - facts.starts[slot]
        last_ahead = min(end + self._shuffle, stretch_end) - 1
        last_slot = int(np.searchsorted(facts.starts, last_ahead, side="right")) - 1
        ahead = tuple(facts.shards[int(slot[0]) : last_slot + 1].tolist())
        return _Window(shard[order], member[order], ahead)


def _starts(counts: NDArray[np.int64]) -> Numbers:
    """Where each of some stretches begins when they follow on each other, and the end of the last."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
