"""Improved precision and recall (Kynkäänniemi et al. 2019) of any number of images, in blocks on both axes.

Distances are products in float32, and what these cannot decide is computed again in float64 from the differences:
which neighbour is the k-th, and whether a point lies in a ball. So the counts are those of float64 throughout, and
the same whatever the blocks, the threads and the device. Beside the features themselves only blocks are in memory
(`peak_bytes`).

Shapes: N, M points; F features; R, C rows and columns of a block; P pairs; G groups.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Final, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditmoe.model.outside.text import counted
from ditmoe.model.threads import MOST_THREADS, map_in_threads

BLOCK: Final = 1024
"""Columns of a block of distances."""
ROWS: Final = 256
"""Rows of one, at most: a block has to fit into a core's cache, and its rows to be long, for every row of every
block is sorted."""
LARGEST: Final = 2 * 10**9
"""Bytes that 50,000 drawn and 50,000 real images in 2,048 features may take."""
CPU: Final = torch.device("cpu")
_MORE: Final = 8
"""Neighbours beyond the k-th that are looked at in float64."""
_PAIR_BYTES: Final = 4 * 2**20
"""Of differences in float64 that are in memory at a time."""
_ROUNDING: Final = 2.0**-24
_BLOCKS_HELD: Final = 8
"""Arrays of the size of a block that a thread holds at a time, at most."""


def peak_bytes(points: int, others: int, features: int, block: int = BLOCK, threads: int = MOST_THREADS) -> int:
    """Bytes that two sets of float32 features and the work on them take at most."""
    rows = min(block, ROWS)
    of_thread = 4 * (_BLOCKS_HELD * rows * block + 3 * (rows + block) * features) + 4 * _PAIR_BYTES
    return 4 * features * (points + others) + 64 * (points + others) + threads * of_thread


assert peak_bytes(50_000, 50_000, 2048) < LARGEST


@dataclass(frozen=True)
class Manifold:
    """What is taken to be the support of a set: a ball around each point (Kynkäänniemi et al. 2019, eq. 1)."""

    points_NF: NDArray[np.floating]
    radii_N: NDArray[np.float64]
    """Squared distance of each point to its k-th nearest other point: how far the ball around it reaches."""
    k: int

    @classmethod
    def of(
        cls, points_NF: NDArray[np.floating], k: int, device: torch.device = CPU, *, block: int = BLOCK
    ) -> Self:
        """The manifold of points, more than k. Neither device nor block is in the result."""
        if len(points_NF) <= k:
            raise ValueError(f"{counted(len(points_NF), 'image')}; more than k = {k} are needed")
        space = _Space(points_NF, points_NF, device)
        radii_N = torch.empty(len(points_NF), dtype=torch.float64)
        _fill(radii_N, lambda rows: _radii(space, rows, k, block), block, device)
        return cls(points_NF, radii_N.numpy(), k)

    def holds(self, points_MF: NDArray[np.floating], *, block: int = BLOCK) -> NDArray[np.bool_]:
        """Which points lie in a ball."""
        space, radii_N = _Space(points_MF, self.points_NF, CPU), torch.from_numpy(self.radii_N)

        def of_rows(rows: slice) -> Tensor:
            found_R = torch.zeros(rows.stop - rows.start, dtype=torch.bool)
            for columns in _cuts(len(self.points_NF), block):
                squared_RC, error_RC = space.squared(rows, columns)
                found_R = space.inside(squared_RC, error_RC, rows, columns, radii_N[columns], found_R)
            return found_R

        inside_M = torch.empty(len(points_MF), dtype=torch.bool)
        _fill(inside_M, of_rows, block, CPU)
        return inside_M.numpy()


class Inside(NamedTuple):
    """Which points of two sets lie in the manifold of the other."""

    drawn_M: NDArray[np.bool_]
    real_N: NDArray[np.bool_]

    @property
    def precision(self) -> float:
        """The share of drawn points in the manifold of the real ones (eq. 2)."""
        return float(self.drawn_M.mean())

    @property
    def recall(self) -> float:
        """The share of real points in the manifold of the drawn ones."""
        return float(self.real_N.mean())


def precision_recall(real: Manifold, drawn: Manifold, device: torch.device = CPU, *, block: int = BLOCK) -> Inside:
    """Which points of each set lie in the manifold of the other; from one pass over the distances."""
    space = _Space(drawn.points_NF, real.points_NF, device)
    drawn_radii, real_radii = (torch.from_numpy(each.radii_N).to(device) for each in (drawn, real))

    in_drawn_N, lock = torch.zeros(len(real.points_NF), dtype=torch.bool), Lock()

    def of_rows(rows: slice) -> Tensor:
        drawn_R = torch.zeros(rows.stop - rows.start, dtype=torch.bool, device=device)
        real_N = torch.zeros(len(real.points_NF), dtype=torch.bool, device=device)
        for columns in _cuts(len(real.points_NF), block):
            squared_RC, error_RC = space.squared(rows, columns)
            drawn_R = space.inside(squared_RC, error_RC, rows, columns, real_radii[columns], drawn_R)
            real_N[columns] = space.inside(
                squared_RC, error_RC, rows, columns, drawn_radii[rows], real_N[columns], of_rows=False
            )
        with lock:  # one array for all rows: one for each would be a block for every 256 images
            in_drawn_N.logical_or_(real_N.cpu())
        return drawn_R

    in_real_M = torch.empty(len(drawn.points_NF), dtype=torch.bool)
    _fill(in_real_M, of_rows, block, device)
    return Inside(in_real_M.numpy(), in_drawn_N.numpy())


def nearest(
    points_MF: NDArray[np.floating], others_NF: NDArray[np.floating], k: int, *, block: int = BLOCK
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k nearest of some points to a few others: Euclidean distances and places `[M, k]`, the nearest first.

    In float64, and for few points: a block of `others_NF` is in memory at a time.
    """
    point_MF = torch.from_numpy(np.ascontiguousarray(points_MF)).double()
    squared_MK = torch.empty(len(point_MF), 0, dtype=torch.float64)
    place_MK = torch.empty(len(point_MF), 0, dtype=torch.int64)
    for columns in _cuts(len(others_NF), block):
        other_CF = torch.from_numpy(np.ascontiguousarray(others_NF[columns])).double()
        # Without the difference of two large squares, which would leave little of a small distance.
        squared_MC = torch.cdist(point_MF, other_CF, compute_mode="donot_use_mm_for_euclid_dist").square()
        squared_MK = torch.cat((squared_MK, squared_MC), 1)
        place_MK = torch.cat((place_MK, torch.arange(columns.start, columns.stop).expand_as(squared_MC)), 1)
        best = squared_MK.topk(min(k, squared_MK.shape[1]), dim=1, largest=False)
        squared_MK, place_MK = best.values, place_MK.gather(1, best.indices)
    return squared_MK.sqrt().numpy(), place_MK.numpy()


def recall_without(
    real: Manifold,
    drawn: Manifold,
    group_M: NDArray[np.int64],
    device: torch.device = CPU,
    *,
    block: int = BLOCK,
) -> NDArray[np.float64]:
    """Recall with each group of the drawn points left out, float64 `[G]`: balls go, and others grow.

    For intervals: distances are float32 here, and a ball grows to the `_MORE`-th neighbour beyond the k-th at
    most.
    """
    groups = int(group_M.max()) + 1
    space = _Space(drawn.points_NF, drawn.points_NF, device)
    group = torch.from_numpy(group_M).to(device)
    rows = list(_cuts(len(drawn.points_NF), min(block, ROWS)))
    radius_MG = torch.empty(len(drawn.points_NF), groups, device=device)
    _fill(radius_MG, lambda cut: _radii_without(space, cut, drawn.k, block, group, groups), block, device)
    across = _Space(drawn.points_NF, real.points_NF, device)

    def covered(columns: slice) -> Tensor:
        found_GC = torch.zeros(groups, columns.stop - columns.start, dtype=torch.bool, device=device)
        for cut in rows:
            squared_RC, _ = across.squared(cut, columns)
            for number in range(groups):
                found_GC[number] |= (squared_RC <= radius_MG[cut, number, None]).any(0)
        return found_GC.cpu()

    found = map_in_threads(covered, list(_cuts(len(real.points_NF), block)), device)
    shares: NDArray[np.float64] = torch.cat(found, 1).double().mean(1).numpy()
    return shares


def _radii_without(space: "_Space", rows: slice, k: int, block: int, group_M: Tensor, groups: int) -> Tensor:
    """Squared radii of some points' balls with each group left out, float32 `[R, G]`; −∞ where they go, too."""
    nearest_RK, column_RK, _ = _nearest(space, rows, min(k + _MORE, len(space.y_MF) - 1), block)
    nearest_RK, order_RK = nearest_RK.sort(1)
    group_RK = group_M[column_RK.gather(1, order_RK)]
    radii = []
    for number in range(groups):
        stays_RK = group_RK != number
        rank_RK = stays_RK.cumsum(1)
        # The k-th of those that stay; the last one that is known where fewer do.
        place_R1 = torch.where(rank_RK[:, -1:] >= k, (rank_RK < k).sum(1, keepdim=True), len(rank_RK[0]) - 1)
        radius_R = nearest_RK.gather(1, place_R1)[:, 0]
        radii.append(radius_R.masked_fill(group_M[rows] == number, -torch.inf))
    return torch.stack(radii, 1)


class _Space:
    """Squared distances between two sets of points."""

    def __init__(self, x_NF: NDArray[np.floating], y_MF: NDArray[np.floating], device: torch.device) -> None:
        assert torch.get_float32_matmul_precision() == "highest", "products are not of float32"
        self.x_NF, self.y_MF, self.device = torch.from_numpy(x_NF), torch.from_numpy(y_MF), device
        # Products are taken of differences from a point among them, so that little cancels.
        self._centre_F = torch.from_numpy(y_MF[:BLOCK].mean(axis=0)).to(device)

    def squared(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Squared distances of x[rows] and y[columns], float32 [R, C], and a bound on the error of each."""
        x_RF, y_CF = self._centred(self.x_NF[rows]), self._centred(self.y_MF[columns])
        sizes_RC = x_RF.square().sum(1)[:, None] + y_CF.square().sum(1)
        squared_RC = torch.addmm(sizes_RC, x_RF, y_CF.T, alpha=-2)
        return squared_RC, sizes_RC.mul_(2 * (x_RF.shape[1] + 8) * _ROUNDING)

    def inside(
        self,
        squared_RC: Tensor,
        error_RC: Tensor,
        rows: slice,
        columns: slice,
        radii: Tensor,
        known: Tensor,
        *,
        of_rows: bool = True,
    ) -> Tensor:
        """Which points of the rows (or else of the columns) are in a ball around one of the others.

        Args:
            radii: squared, float64, of the others.
            known: which points are inside anyway.
        """
        radius_RC = (radii if of_rows else radii[:, None]).to(torch.float32).expand_as(squared_RC)
        # The rounding of a radius to float32 is within the error: no radius that matters is larger than the sizes.
        low_RC = squared_RC - error_RC
        found = (squared_RC + error_RC <= radius_RC * (1 - 2 * _ROUNDING)).any(dim=1 if of_rows else 0) | known
        near_RC = (low_RC <= radius_RC * (1 + 2 * _ROUNDING)) & ~(found[:, None] if of_rows else found)
        # Ordered so that many points come before many balls for one of them.
        pairs_P2 = near_RC.T.nonzero().flip(1) if of_rows else near_RC.nonzero()
        at_once = max(1, _PAIR_BYTES // (8 * self.x_NF.shape[1]))
        for first in range(0, len(pairs_P2), at_once):
            row_P, column_P = pairs_P2[first : first + at_once].T
            point_P, ball_P = (row_P, column_P) if of_rows else (column_P, row_P)
            open_P = ~found[point_P]
            row_P, column_P, point_P, ball_P = (each[open_P] for each in (row_P, column_P, point_P, ball_P))
            exact_P = self.exact(row_P + rows.start, column_P + columns.start)
            found[point_P[exact_P <= radii[ball_P]]] = True
        return found

    def exact(self, row_P: Tensor, column_P: Tensor) -> Tensor:
        """Squared distances of pairs in float64, `[P]`: of each pair the same, whichever others are asked for."""
        x_PF = self.x_NF[row_P.cpu()].to(self.device, torch.float64)
        return x_PF.sub_(self.y_MF[column_P.cpu()].to(self.device, torch.float64)).square_().sum(1)

    def _centred(self, points_RF: Tensor) -> Tensor:
        return (points_RF.to(self.device) - self._centre_F).to(torch.float32)


def _radii(space: _Space, rows: slice, k: int, block: int) -> Tensor:
    """Squared distances of some points to their k-th nearest other point, float64 `[R]` on the CPU."""
    count, device = len(space.y_MF), space.device
    kept = min(k + _MORE, count - 1)
    number_R = torch.arange(rows.start, rows.stop, device=device)
    nearest_RK, column_RK, largest_error_R = _nearest(space, rows, kept, block)
    exact_RK = _exact_rows(space, number_R, column_RK)
    radii_R = exact_RK.kthvalue(k, dim=1).values
    if kept < count - 1:
        # Those that were passed over are no nearer than the farthest that was kept, but for its error and theirs.
        sure_R = (radii_R <= nearest_RK[:, -1].double() - largest_error_R.double()) | (radii_R == 0)
        for place in (~sure_R).nonzero()[:, 0].tolist():
            others_K = torch.cat((torch.arange(place + rows.start), torch.arange(place + rows.start + 1, count)))
            whole_1K = _exact_rows(space, number_R[place : place + 1], others_K.to(device)[None])
            radii_R[place] = whole_1K.kthvalue(k, dim=1).values[0]
    return radii_R


def _nearest(space: _Space, rows: slice, kept: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest other points of some points: float32 squared distances and numbers `[R, kept]`, by distance;
    and the largest error of any distance of each, `[R]`."""
    count, device = len(space.y_MF), space.device
    number_R = torch.arange(rows.start, rows.stop, device=device)
    nearest_RK = torch.empty(len(number_R), 0, device=device)
    column_RK = nearest_RK.long()
    largest_error_R = torch.zeros(len(number_R), device=device)
    for columns in _cuts(count, block):
        squared_RC, error_RC = space.squared(rows, columns)
        own_R = number_R - columns.start  # a point is no neighbour of its own
        there_R = (own_R >= 0) & (own_R < squared_RC.shape[1])
        squared_RC[there_R.nonzero()[:, 0], own_R[there_R]] = torch.inf
        largest_error_R = torch.maximum(largest_error_R, error_RC.amax(1))
        best = squared_RC.topk(min(kept, squared_RC.shape[1]), dim=1, largest=False)
        nearest_RK = torch.cat((nearest_RK, best.values), 1)
        column_RK = torch.cat((column_RK, best.indices + columns.start), 1)
        best = nearest_RK.topk(min(kept, nearest_RK.shape[1]), dim=1, largest=False)
        nearest_RK, column_RK = best.values, column_RK.gather(1, best.indices)
    return nearest_RK, column_RK, largest_error_R


def _exact_rows(space: _Space, number_R: Tensor, column_RK: Tensor) -> Tensor:
    """Squared distances of each point to some others of its own, float64 `[R, K]`."""
    row_P, column_P = number_R[:, None].expand_as(column_RK).reshape(-1), column_RK.reshape(-1)
    at_once = max(1, _PAIR_BYTES // (8 * space.x_NF.shape[1]))
    parts = [space.exact(row_P[cut], column_P[cut]) for cut in _cuts(len(row_P), at_once)]
    return torch.cat(parts).reshape(column_RK.shape)


def _fill(out_N: Tensor, of_rows: Callable[[slice], Tensor], block: int, device: torch.device) -> None:
    """Write what a function says of rows into the place of each.

    Results that were kept one by one would lie in between the blocks that are freed, which the allocator then
    does not give back: so much more memory for every block.
    """

    def fill(rows: slice) -> None:
        out_N[rows] = of_rows(rows)

    map_in_threads(fill, list(_cuts(len(out_N), min(block, ROWS))), device)


def _cuts(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))
