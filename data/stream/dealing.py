"""Which process reads which positions: lanes dealt to ranks, and to the workers of a rank.

The positions of a micro-step are consecutive, and each rank gets its share of them in chunks of consecutive ones,
chunk c of the run going to rank c mod ranks. Where the lanes allow it, chunks are such that a rank only ever meets
its own lanes, and each worker of the rank its own part of those: then each shard is read by one process. Which
sample stands at which position has nothing to do with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, lcm

import numpy as np

from ditmoe.data.stream.mixture import Numbers


@dataclass(frozen=True)
class Dealing:
    """How the positions from `start` on are dealt."""

    start: int
    ranks: int
    micro_batch: int
    """Positions of a rank in one micro-step."""
    chunk: int
    """Consecutive positions that go to one rank; divides `micro_batch`."""
    parts: int
    """Parts that a chunk is cut into, one for each worker; 1: a worker reads whole micro-batches."""

    def batches(self, rank: int) -> Iterator[list[Numbers]]:
        """A rank's positions, micro-step after micro-step without end, each in `parts`."""
        chunks = self.micro_batch // self.chunk
        width = self.chunk // self.parts
        within = np.arange(self.chunk).reshape(self.parts, 1, width)
        first_chunk = rank
        while True:
            numbers = first_chunk + self.ranks * np.arange(chunks)
            first_chunk += self.ranks * chunks
            yield [part.ravel() for part in self.start + numbers[:, None] * self.chunk + within]

    def readers_per_lane(self, lanes: int, workers: int) -> int:
        """Most processes that read one lane; 1: no shard is read by two processes, but where two lanes meet."""
        workers = max(workers, 1)
        steps = lcm(lanes // gcd(lanes, self.ranks * self.micro_batch), workers)
        reads = np.zeros((self.ranks, workers, lanes), dtype=bool)
        for rank in range(self.ranks):
            for step, parts in zip(range(steps), self.batches(rank), strict=False):
                for number, part in enumerate(parts):
                    # Whole micro-batches go to the workers in turn.
                    reads[rank, number if self.parts > 1 else step % workers, part % lanes] = True
        return int(reads.sum(axis=(0, 1)).max())

    def rows(self) -> Numbers:
        """Where in the concatenated parts of a micro-batch its rows, in the order of positions, stand."""
        chunks = self.micro_batch // self.chunk
        places = np.arange(self.micro_batch).reshape(self.parts, chunks, self.chunk // self.parts)
        return places.transpose(1, 0, 2).ravel()


def deal(*, start: int, lanes: int, ranks: int, workers: int, micro_batch: int, group: int) -> Dealing:
    """The dealing by which the fewest processes read a lane.

    Args:
        workers: reading processes of a rank; 0: the rank itself.
        group: consecutive positions that must stay on one rank, when they fit into a micro-batch.
    """
    assert start >= 0 and lanes > 0 and ranks > 0 and micro_batch > 0
    kept = group if micro_batch % group == 0 else 1  # a larger group is the whole micro-step, on all ranks
    for parts in dict.fromkeys((max(workers, 1), 1)):
        if micro_batch % parts == 0 and lanes % (ranks * parts) == 0:
            chunk = parts * gcd(micro_batch // parts, lanes // (ranks * parts))
            if chunk % kept == 0:
                return Dealing(start, ranks, micro_batch, chunk, parts)
    return Dealing(start, ranks, micro_batch, chunk=micro_batch, parts=1)
