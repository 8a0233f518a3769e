"""Recall of whole chains beside that of independent samples, at equal number.

Recall alone does not tell a correlated set from a small one. So the same images are cut two ways: into sets of a
few whole stretches, and into sets of images that each come from a chain of their own. All sets have equally many
images of each class, so that only what a chain repeats tells them apart.

Shapes: C chains, S samples of each, F features, N real images; P sets, n images of a set.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ditmoe.model.randomness import permutation
from ditmoe.sampling.metrics.neighbours import Manifold

SETS: Final = 8
"""Sets of each kind whose recall is averaged, at most."""
REAL_IMAGES: Final = 1000
"""Real images that recall is measured on, at most: the cost is quadratic."""
FEWEST: Final = 8
"""Images of a set, and real images, below which recall is not given. With 8 of independent images the ratio is 1
within a few per cent (4 to 64 Gaussian features); with k + 1 = 4 each ball reaches to the farthest image."""
_NEIGHBOURS: Final = 3


def recall_figures(
    features_CSF: NDArray[np.floating], label_C: NDArray[np.int64], real_features_NF: NDArray[np.floating]
) -> tuple[dict[str, Any], list[str]]:
    """Recall of both kinds of set, their ratio and the numbers behind them; and warnings.

    Returns:
        `recall_of_chains`, `recall_of_independent`, `ratio`, `images` (n of a set), `sets`, `stretch` (successive
        samples of a chain); the recalls and the ratio are null where they cannot be told.
    """
    figures: dict[str, Any] = {
        "recall_of_chains": None,
        "recall_of_independent": None,
        "ratio": None,
        "images": 0,
        "sets": 0,
        "stretch": 0,
        "real_images": min(len(real_features_NF), REAL_IMAGES),
    }
    if features_CSF.shape[1] < 2:
        return figures, ["recall of chains is not known: each gave one sample"]
    stretch = _stretch(label_C, features_CSF.shape[1])
    if stretch is None:
        return figures, ["recall of chains is not known: fewer than half of the chains share their class"]
    sets = min(stretch, SETS)
    whole, single = _sets(label_C, stretch, sets)
    images = len(whole[0][0])
    figures |= {"images": images, "sets": sets, "stretch": stretch}
    if min(images, len(real_features_NF)) < FEWEST:
        return figures, [
            f"recall of chains is not known: sets of {images} drawn images and {len(real_features_NF)} real ones; "
            f"at least {FEWEST} of each are needed (more chains)"
        ]
    chosen = permutation(0, "chain recall/real", 0, len(real_features_NF))[:REAL_IMAGES]
    real_NF = np.asarray(real_features_NF[chosen], dtype=np.float64)

    def recall(parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> float:
        manifolds = (Manifold.of(features_CSF[chain, place], _NEIGHBOURS) for chain, place in parts)
        return float(np.mean([manifold.holds(real_NF).mean() for manifold in manifolds]))

    of_chains, of_independent = recall(whole), recall(single)
    figures |= {"recall_of_chains": of_chains, "recall_of_independent": of_independent}
    if of_independent == 0:
        return figures, ["no real image is recalled: what chains lose of it is not known"]
    figures["ratio"] = of_chains / of_independent
    return figures, []


def _stretch(label_C: NDArray[np.int64], samples: int) -> int | None:
    """L: the most successive samples, such that at least half of the chains are of classes with L chains or more.

    A set has m·L images of a class: of m chains, or one of each of m·L.
    """
    size_K = np.unique(label_C, return_counts=True)[1]
    for length in range(min(samples, int(size_K.max())), 1, -1):
        if 2 * (size_K // length * length).sum() >= len(label_C):
            return length
    return None


def _sets(
    label_C: NDArray[np.int64], stretch: int, sets: int
) -> tuple[list[tuple[NDArray[np.int64], NDArray[np.int64]]], list[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """Disjoint sets of whole stretches, and of images from a chain each: (chain `[n]`, place `[n]`) of each set.

    Of m·L chains of a class, a square of m·L × L images: cut along chains it gives L sets of m chains, and along
    diagonals L sets in which each chain comes once.
    """
    chains_KM = []
    for label in np.unique(label_C):
        chains = np.flatnonzero(label_C == label)
        used = len(chains) // stretch * stretch
        if used:
            chains_KM.append(chains[:used])
    place = np.arange(stretch)
    whole, single = [], []
    for number in np.linspace(0, stretch, sets, endpoint=False).astype(int):
        parts = [chains.reshape(stretch, -1)[number] for chains in chains_KM]
        few = np.concatenate(parts)
        whole.append((np.repeat(few, stretch), np.tile(place, len(few))))
        each = [(np.arange(len(chains)) + number) % stretch for chains in chains_KM]
        single.append((np.concatenate(chains_KM), np.concatenate(each)))
    return whole, single
