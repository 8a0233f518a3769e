"""Count, mean and scatter of feature vectors, in float64: of parts of a set they merge to those of the whole.

Rows are gathered in blocks of one size, whatever pieces they come in, and each block is added in one product. On
a CPU the product is cut into tiles that each take one thread, as many at once as there are threads. Block and tile
are no settings, so the last digits tell neither how rows came nor how many threads there were.

Shapes: N rows, F features, B rows of a block.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from typing import Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditmoe.model.threads import one_thread

Float64 = NDArray[np.float64]

BLOCK: Final = 2048
"""Rows that are added in one product. Fewer make it one of memory rather than of arithmetic."""
TILE: Final = 256
"""Rows and columns of the scatter that one thread adds to at a time."""
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter (sum of outer products of deviations from the mean) of feature vectors."""

    count: int
    mean_F: Float64
    scatter_FF: Float64

    @classmethod
    def empty(cls, dimension: int) -> Self:
        """The moments of no images."""
        return cls(0, np.zeros(dimension), np.zeros((dimension, dimension)))

    @classmethod
    def of(cls, features_NF: NDArray[np.floating]) -> Self:
        """The moments of the rows of `features_NF`."""
        return cls.of_stream([features_NF], features_NF.shape[1])

    @classmethod
    def of_stream(cls, parts: Iterable[NDArray[np.floating]], dimension: int, device: torch.device = _CPU) -> Self:
        """The moments of all rows of some arrays, the same however the rows are shared out among arrays."""
        total = MomentsSum(dimension, device)
        for part_NF in parts:
            total.add(part_NF)
        found = total.moments()
        return cls(found.count, found.mean_F, found.scatter_FF)

    def merge(self, other: "Moments") -> Self:
        """The moments of both sets together.

        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
        (1982): only deviations from means are added, so that nothing cancels.
        """
        count = self.count + other.count
        if count == 0:
            return self
        shift_F = other.mean_F - self.mean_F
        mean_F = self.mean_F + shift_F * (other.count / count)
        between_FF = np.outer(shift_F, shift_F) * (self.count * other.count / count)
        return type(self)(count, mean_F, self.scatter_FF + other.scatter_FF + between_FF)

    def without(self, other: "Moments") -> Self:
        """The moments of the rest of the set, where the other is a part of it."""
        count = self.count - other.count
        assert count > 0
        mean_F = self.mean_F + (self.mean_F - other.mean_F) * (other.count / count)
        shift_F = other.mean_F - mean_F
        between_FF = np.outer(shift_F, shift_F) * (count * other.count / self.count)
        return type(self)(count, mean_F, self.scatter_FF - other.scatter_FF - between_FF)

    @property
    def dimension(self) -> int:
        """Number of features F."""
        return len(self.mean_F)

    @property
    def covariance_FF(self) -> Float64:
        """Unbiased covariance (divided by count − 1)."""
        assert self.count > 1
        covariance_FF: Float64 = self.scatter_FF / (self.count - 1)
        return covariance_FF


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of feature vectors as a file states them; of how many they are it may not tell."""

    count: int | None
    mean_F: Float64
    covariance_FF: Float64

    @property
    def dimension(self) -> int:
        """Number of features F."""
        return len(self.mean_F)


class MomentsSum:
    """The moments of rows that come a few at a time."""

    def __init__(self, dimension: int, device: torch.device = _CPU) -> None:
        """No rows yet; sums are kept, and products taken, on `device`."""
        self._dimension, self._device = dimension, device
        self._waiting: list[NDArray[np.floating]] = []
        self._rows = 0
        self._count = 0
        self._mean_F = torch.zeros(dimension, dtype=torch.float64, device=device)
        self._scatter_FF: Tensor | None = None
        """Tiles on and above the diagonal; the others follow from symmetry. None: no block yet."""

    def add(self, features_NF: NDArray[np.floating]) -> None:
        """Take some rows, of which those short of a block are kept as they are; the caller leaves them alone."""
        assert features_NF.ndim == 2 and features_NF.shape[1] == self._dimension, features_NF.shape
        while len(features_NF):
            some_NF, features_NF = np.split(features_NF, [BLOCK - self._rows])
            self._waiting.append(some_NF)
            self._rows += len(some_NF)
            if self._rows == BLOCK:
                self._add_block()

    def moments(self) -> Moments:
        """The moments of all rows so far. More may follow only where these were whole blocks."""
        if self._rows:
            self._add_block()
        if self._scatter_FF is None:
            return Moments.empty(self._dimension)
        with one_thread():  # a process that is forked from one with threads has none of them, and would wait
            scatter_FF = self._scatter_FF.triu()
            scatter_FF += scatter_FF.triu(1).T
        return Moments(self._count, self._mean_F.cpu().numpy().copy(), scatter_FF.cpu().numpy())

    def _add_block(self) -> None:
        """Add the rows that wait: Chan's update, with the term between the means as one more row."""
        rows = self._rows
        x_BF = torch.from_numpy(np.concatenate(self._waiting)).to(self._device).double()
        self._waiting, self._rows = [], 0
        if self._scatter_FF is None:
            self._scatter_FF = x_BF.new_zeros(self._dimension, self._dimension)
        threads = torch.get_num_threads()
        with one_thread():
            mean_F = x_BF.mean(0)
            shift_F = mean_F - self._mean_F
            count = self._count + rows
            deviation_BF = torch.cat((x_BF.sub_(mean_F), (shift_F * (self._count * rows / count) ** 0.5)[None]))
            self._mean_F += shift_F * (rows / count)
            self._count = count
            if self._device.type == "cpu":
                _add_products(self._scatter_FF, deviation_BF, threads)
            else:
                self._scatter_FF.addmm_(deviation_BF.T, deviation_BF)


def _add_products(scatter_FF: Tensor, x_BF: Tensor, threads: int) -> None:
    """Add xᵀx to the tiles of the scatter on and above its diagonal, each tile in one thread."""
    places = [slice(first, first + TILE) for first in range(0, len(scatter_FF), TILE)]
    tiles = list(combinations_with_replacement(places, 2))

    def add(tile: tuple[slice, slice]) -> None:
        rows, columns = tile
        scatter_FF[rows, columns].addmm_(x_BF[:, rows].T, x_BF[:, columns])

    if min(threads, len(tiles)) == 1:
        for tile in tiles:
            add(tile)
        return
    one = partial(torch.set_num_threads, 1)  # a setting of the thread
    with ThreadPoolExecutor(min(threads, len(tiles)), initializer=one) as pool:
        list(pool.map(add, tiles))
