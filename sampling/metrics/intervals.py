"""How far a figure would be from what it is, had a network drawn other images: the delete-a-group jackknife.

The drawn images are cut, in their order, into GROUPS groups. Each figure is computed again with each group left
out, and (G − 1)/G times the sum of squares of what comes out, from its mean, is the variance of the figure (Kott
2001, "The delete-a-group jackknife"; Shao and Tu 1995, chapter 2). Figures here are smooth functions of means, of
which this is consistent, and where they bend it errs upwards (Efron and Stein 1981). The bootstrap does not serve:
images that come twice lower the rank of a covariance and are their own nearest neighbours, so that a Fréchet
distance of a resample lies above the figure by more than the figure's error, and recall below it.

The real images, or their statistics, are held as they are. So an interval is of the figure *at this number of
images*: it does not reach for what a Fréchet distance of infinitely many would be, below that of a finite number.

Shapes: N images, F features, G groups.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.model.threads import one_thread
from ditmoe.sampling.metrics.frechet import root_of
from ditmoe.sampling.metrics.inception_score import SPLIT, SplitSums
from ditmoe.sampling.metrics.moments import Gaussian, Moments

GROUPS: Final = 20
LEVEL: Final = 0.95
LEAST_IMAGES: Final = 2 * GROUPS
"""Drawn images; of fewer there is no interval."""
_QUANTILE: Final = 2.0930240544082634
"""0.975 of Student's t with GROUPS − 1 degrees of freedom."""
METHOD: Final[dict[str, Any]] = {"method": "delete-a-group jackknife of the drawn images", "groups": GROUPS}

_CPU: Final = torch.device("cpu")
Float64 = NDArray[np.float64]


def groups_of(count: int) -> NDArray[np.int64]:
    """The group of each of some images: runs of one length, so that samples of a chain are together."""
    return np.arange(count) * GROUPS // max(count, 1)


def interval(
    value: float, without_G: Float64, least: float = -np.inf, most: float = np.inf
) -> tuple[float, float]:
    """The ends of the interval around a figure that holds its mean at this number of images in LEVEL of all cases.

    Args:
        without_G: the figure with each group left out.
        least, most: between which the figure lies by its definition.
    """
    groups = len(without_G)
    variance = (groups - 1) / groups * float(((without_G - without_G.mean()) ** 2).sum())
    reach = _QUANTILE * variance**0.5
    return max(least, value - reach), min(most, value + reach)


def frechet_without(
    total: Moments,
    rows: Iterable[NDArray[np.floating]],
    real: Moments | Gaussian,
    device: torch.device = _CPU,
) -> Float64:
    """The Fréchet distance with each group left out, float64 `[G]`; ten matrices `[F, F]` are held at a time.

    One factor of the real covariance serves for all. What rounding does to a distance is far below what a group
    does.

    Args:
        total: the moments of all rows.
        rows: the features, a few rows at a time.
        device: where products are taken.
    """
    factor_RF = root_of(real).to(device)
    trace = float(np.trace(real.covariance_FF))
    found = []
    with one_thread():
        for group in _moments_of_groups(rows, total, device):
            rest = total.without(group)
            covariance_FF = torch.from_numpy(rest.covariance_FF).to(device)
            product_RR = factor_RF @ covariance_FF @ factor_RF.T
            roots_R = torch.linalg.eigvalsh((product_RR + product_RR.T) / 2).clamp(min=0).sqrt()
            shift = float(np.sum((rest.mean_F - real.mean_F) ** 2))
            found.append(shift + float(covariance_FF.trace()) + trace - 2 * float(roots_R.sum()))
    return np.array(found)


def _moments_of_groups(
    rows: Iterable[NDArray[np.floating]], total: Moments, device: torch.device
) -> Iterator[Moments]:
    """Of each group of the rows, one at a time."""
    ends = np.searchsorted(groups_of(total.count), np.arange(GROUPS), side="right").tolist()
    waiting: list[NDArray[np.floating]] = []
    first = count = 0
    for some_NF in rows:
        while len(ends) and first + count + len(some_NF) >= ends[0]:
            whole_NF, some_NF = np.split(some_NF, [ends.pop(0) - first - count])
            waiting.append(whole_NF)
            yield Moments.of_stream(waiting, total.dimension, device)
            first += count + len(whole_NF)
            waiting, count = [], 0
        waiting.append(some_NF)
        count += len(some_NF)


def inception_score_without(probabilities_NP: NDArray[np.floating], split: int = SPLIT) -> Float64:
    """The Inception Score with each group left out, the splits being those of all images; float64 `[G]`."""
    count = len(probabilities_NP)
    splits = -(-count // split)
    place_N = np.arange(count) // split * GROUPS + groups_of(count)
    sums = SplitSums.of(probabilities_NP, place_N, splits * GROUPS)
    by_group = SplitSums(
        sums.count_S.reshape(splits, GROUPS),
        sums.probability_SP.reshape(splits, GROUPS, -1),
        sums.negentropy_S.reshape(splits, GROUPS),
    )
    found = []
    for group in range(GROUPS):
        kept = np.arange(GROUPS) != group
        rest = SplitSums(*(value[:, kept].sum(axis=1) for value in vars(by_group).values()))
        found.append(float(rest.scores_S.mean()))
    return np.array(found)


def share_without(inside_N: NDArray[np.bool_]) -> Float64:
    """The share of images that something holds for, with each group left out; float64 `[G]`."""
    group_N = groups_of(len(inside_N))
    size_G, held_G = (np.bincount(group_N, weights=each, minlength=GROUPS) for each in (None, inside_N))
    shares: Float64 = (held_G.sum() - held_G) / (len(inside_N) - size_G)
    return shares
