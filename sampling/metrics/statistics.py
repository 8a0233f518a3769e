"""The figures that are computed from features of images, in float64.

Shapes: N, M images; F features. Products are computed in one thread: in another order the last digits are others.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.model.threads import one_thread
from ditmoe.sampling.metrics.moments import Float64

INCEPTION_SCORE_SPLIT = 5000
"""Images per split of the Inception Score, as in the ADM protocol."""

_BLOCK = 1024
"""Rows of a block of pairwise distances."""


@dataclass(frozen=True)
class Manifold:
    """What improved precision and recall take to be the support of a set (Kynkäänniemi et al. 2019, eq. 1)."""

    centre_F: Float64
    """Subtracted from all features before products are taken, so that little cancels."""
    points_NF: Float64
    """Less the centre."""
    radii_N: Float64
    """Squared distance of each point to its k-th nearest other point: how far the ball around it reaches."""
    k: int

    @classmethod
    def of(cls, features_NF: NDArray[np.floating], k: int, centre_F: Float64 | None = None) -> Self:
        """The manifold of the rows, more than k.

        Args:
            features_NF: the set.
            k: which neighbour decides.
            centre_F: None: the mean of the set.
        """
        if len(features_NF) <= k:
            raise ValueError(f"{len(features_NF)} images; more than k = {k} are needed")
        x_NF = np.asarray(features_NF, dtype=np.float64)
        centre_F = x_NF.mean(axis=0) if centre_F is None else centre_F
        return cls(centre_F, x_NF - centre_F, _radii(x_NF - centre_F, k), k)

    def share_of(self, points_MF: Float64) -> float:
        """The share of points, less the centre, that lie inside."""
        return _share_inside(points_MF, self.points_NF, self.radii_N)


def precision_recall(real: Manifold, fake_MF: NDArray[np.floating]) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 2).

    Precision is the share of `fake_MF` in the manifold of the real images, recall the share of the real images in
    the manifold of `fake_MF`, of the same k.
    """
    fake = Manifold.of(fake_MF, real.k, real.centre_F)
    return real.share_of(fake.points_NF), fake.share_of(real.points_NF)


def _squared_distances(x_NF: Float64, y_MF: Float64) -> Float64:
    squared: Float64 = (x_NF**2).sum(1)[:, None] + (y_MF**2).sum(1)[None, :] - 2 * _product(x_NF, y_MF.T)
    return np.maximum(squared, 0)


def _radii(x_NF: Float64, k: int) -> Float64:
    """Squared distance of each point to its k-th nearest other point."""
    radii = np.empty(len(x_NF))
    for start in range(0, len(x_NF), _BLOCK):
        squared = _squared_distances(x_NF[start : start + _BLOCK], x_NF)
        rows = np.arange(len(squared))
        squared[rows, start + rows] = np.inf  # a point is no neighbour of its own
        radii[start : start + _BLOCK] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _share_inside(points_NF: Float64, centres_MF: Float64, radii_M: Float64) -> float:
    inside = 0
    for start in range(0, len(points_NF), _BLOCK):
        squared = _squared_distances(points_NF[start : start + _BLOCK], centres_MF)
        inside += int((squared <= radii_M).any(axis=1).sum())
    return inside / len(points_NF)


def _product(a_NF: Float64, b_FM: Float64) -> Float64:
    with one_thread():
        product_NM: Float64 = (torch.from_numpy(a_NF) @ torch.from_numpy(b_FM)).numpy()
    return product_NM


def inception_score(
    probabilities_NP: NDArray[np.floating], split: int = INCEPTION_SCORE_SPLIT
) -> tuple[float, float, int]:
    """Inception Score (Salimans et al. 2016): exp of the mean KL(p(y|x) ‖ p(y)) over splits of `split` images.

    Returns:
        Mean and standard deviation over the splits, and the number of splits.
    """
    scores = []
    for start in range(0, len(probabilities_NP), split):
        p_NP = np.asarray(probabilities_NP[start : start + split], dtype=np.float64)
        log_p_NP = np.log(np.maximum(p_NP, np.finfo(np.float64).tiny))
        log_marginal_P = np.log(np.maximum(p_NP.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p_NP * (log_p_NP - log_marginal_P)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores)), len(scores)
