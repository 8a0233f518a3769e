"""Which source each position of the global order draws from, and which of that source's samples it is.

The sources take turns in one pattern that repeats, so every stretch of `window` positions, wherever it begins,
holds each source's share exactly. A source's samples are numbered in the order in which they come, 0, 1, 2, …
without end, and nothing but the position says which number it is.

A position belongs to lane `position mod lanes`. As pattern and lanes both repeat, how many of a source's first x
numbers fall to a lane is a sum in closed form: `counts_before`. The order of a source is built on it (order.py).
"""

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted

LONGEST_WINDOW: Final = 10_000
"""Positions after which the pattern must repeat; bounds the tables here."""

LONGEST_REPEAT: Final = 2**25
"""Positions after which pattern and lanes must begin anew together; bounds the tables of every source."""

Numbers = NDArray[np.int64]


def quotas(weights: Sequence[float], window: int | None) -> tuple[int, ...]:
    """Samples of each source in one window, which is their sum: the weights, as whole numbers.

    Args:
        weights: shares, taken as the decimal numbers that they are written as.
        window: their sum; None: the smallest there is.

    Raises:
        UserError: no window of at most LONGEST_WINDOW, or not this one, holds the weights exactly.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    smallest = lcm(*(share.denominator for share in shares))
    if smallest > LONGEST_WINDOW:
        raise UserError(
            f"data.sources: the weights {', '.join(f'{weight:g}' for weight in weights)} hold exactly over"
            f" {counted(smallest, 'sample')} only; expected weights such as 1 and 5, that do so over at most"
            f" {LONGEST_WINDOW:,}"
        )
    chosen = smallest if window is None else window
    if chosen % smallest or chosen > LONGEST_WINDOW:
        raise UserError(
            f"data.window = {window} must be a multiple of {smallest}, over which the weights of data.sources hold"
            f" exactly, and at most {LONGEST_WINDOW:,}"
        )
    return tuple(int(share * chosen) for share in shares)


class _Turns(NamedTuple):
    """One source's turns, over the stretch of its numbers after which pattern and lanes begin anew together."""

    places: Numbers
    """Places of the source in the pattern, rising; as many as its quota."""
    lane: Numbers
    """Lane of each number of the stretch."""
    rank: Numbers
    """How many earlier numbers of the stretch have the same lane."""
    per_lane: Numbers
    """How many numbers of the stretch each lane has."""


class Mixture:
    """The pattern of the sources over positions and lanes.

    Args:
        quota: samples of each source in a window (`quotas`).
        lanes: lanes of the order.

    Raises:
        UserError: pattern and lanes make tables that are too long.
    """

    def __init__(self, quota: Sequence[int], lanes: int) -> None:
        assert min(quota) > 0 and lanes > 0
        self.quotas = tuple(quota)
        self.window = sum(quota)
        self.lanes = lanes
        # Pattern and lanes begin anew together after so many positions, and the tables below are as long.
        if (repeats := lcm(self.window, lanes)) > LONGEST_REPEAT:
            raise UserError(
                f"data.lanes = {lanes:,} with the mixture of data.sources, which repeats after {self.window:,}"
                f" samples: both begin anew together after {repeats:,}; expected at most {LONGEST_REPEAT:,}, with"
                " data.lanes a power of two, or simpler weights"
            )
        self._pattern = _spread(quota)
        self._seen = np.zeros((len(quota), self.window + 1), dtype=np.int64)
        """How often a source came among the first places of the pattern."""
        for source in range(len(quota)):
            self._seen[source, 1:] = np.cumsum(self._pattern == source)
        self._turns = [self._make_turns(source) for source in range(len(quota))]

    def split(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """StreamSource and number of each position."""
        window, place = np.divmod(positions, self.window)
        source = self._pattern[place]
        return source, window * np.asarray(self.quotas)[source] + self._seen[source, place]

    def seen(self, source: int, position: int) -> int:
        """How many of the source's numbers come before a position."""
        window, place = divmod(position, self.window)
        return window * self.quotas[source] + int(self._seen[source, place])

    def lane(self, source: int, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """Lane of each of a source's numbers, and how many of its earlier numbers have the same lane."""
        turns = self._turns[source]
        stretch, place = np.divmod(numbers, len(turns.lane))
        lane = turns.lane[place]
        return lane, stretch * turns.per_lane[lane] + turns.rank[place]

    def counts_before(self, source: int, number: int) -> Numbers:
        """How many of a source's numbers below `number` each lane has, `[lanes]`."""
        turns = self._turns[source]
        stretches, rest = divmod(number, len(turns.lane))
        return stretches * turns.per_lane + np.bincount(turns.lane[:rest], minlength=self.lanes)

    def _make_turns(self, source: int) -> _Turns:
        places = np.flatnonzero(self._pattern == source)
        windows = self.lanes // gcd(self.window, self.lanes)
        positions = (np.arange(windows)[:, None] * self.window + places).ravel()
        lane = positions % self.lanes
        per_lane = np.bincount(lane, minlength=self.lanes)
        rank = np.empty_like(lane)
        by_lane = np.argsort(lane, kind="stable")
        rank[by_lane] = np.arange(len(lane)) - np.repeat(np.cumsum(per_lane) - per_lane, per_lane)
        return _Turns(places, lane, rank, per_lane)


def _spread(quota: Sequence[int]) -> Numbers:
    """The sources of a window, each spread evenly over it: whoever is furthest behind its share comes next."""
    window = sum(quota)
    behind = np.zeros(len(quota), dtype=np.int64)
    pattern = np.empty(window, dtype=np.int64)
    for place in range(window):
        behind += quota
        pattern[place] = np.argmax(behind)
        behind[pattern[place]] -= window
    return pattern
