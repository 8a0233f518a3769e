"""How chains move among modes, beside what independent samples would do.

A chain may look well mixed while it never leaves one mode. Modes are here clusters of the real images' features.
Changes between the clusters of one large mode hide that it is never left; the number of clusters visited does not.
What is expected of independent samples is taken from the drawn images themselves, from other chains of the same
class, so that a model which leaves modes out does not pass for a chain that is stuck.

Shapes: C chains, S samples of each, F features, N real images, G modes.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from ditmoe.model.randomness import generator

MODES: Final = 20
"""Clusters of the real images."""
REAL_PER_MODE: Final = 10
"""With fewer than MODES times so many real images there are fewer modes."""
CHANCE_DRAWS: Final = 400
"""Pairs of sets that the total variation of chance is a mean over."""
LITTLE: Final = 0.02
"""Expected share of changes below which the share found is not compared with it."""

Float64 = NDArray[np.float64]


def mode_figures(
    features_CSF: NDArray[np.floating],
    label_C: NDArray[np.int64],
    compared_C: NDArray[np.bool_],
    real_features_NF: NDArray[np.floating],
) -> tuple[dict[str, Any], list[str]]:
    """Changes of mode, modes visited, and occupancy; and warnings of the modes themselves.

    Args:
        compared_C: chains whose class has other chains.

    Returns:
        `modes` G; `changes`: share of successive samples of a chain that lie in different modes, expected, ratio;
        `visited`: modes that a chain visits (mean, least, median, most, expected, ratio); `visited_histogram`:
        chains that visit 1 … G modes; `occupancy_drawn`, `occupancy_real` and their total variation. `changes` and
        `visited` are of the compared chains; null where there are none, or one sample of each.
    """
    nothing = {"share": None, "expected": None, "ratio": None}
    figures: dict[str, Any] = {
        "modes": 0,
        "changes": dict(nothing),
        "visited": None,
        "visited_histogram": None,
        "occupancy_drawn": None,
        "occupancy_real": None,
        "total_variation": None,
        "total_variation_of_chance": None,
    }
    clusters = min(MODES, len(real_features_NF) // REAL_PER_MODE)
    if clusters >= 2:
        clusters = min(clusters, len(np.unique(real_features_NF, axis=0)))
    if clusters < 2:
        return figures, [
            f"modes are not known: they are clusters of {REAL_PER_MODE} real images or more, at least 2 of them; "
            f"there are {len(real_features_NF)} real images"
        ]
    real_N, mode_CS = _modes(features_CSF, real_features_NF, clusters)
    drawn_G = np.bincount(mode_CS.ravel(), minlength=clusters) / mode_CS.size
    real_G = np.bincount(real_N, minlength=clusters) / len(real_N)
    figures |= {
        "modes": clusters,
        "occupancy_drawn": drawn_G.tolist(),
        "occupancy_real": real_G.tolist(),
        "total_variation": float(np.abs(drawn_G - real_G).sum() / 2),
        "total_variation_of_chance": _chance(drawn_G, mode_CS.size, real_G, len(real_N)),
    }
    if not compared_C.any() or mode_CS.shape[1] < 2:
        return figures, []
    mode_CS, label_C = mode_CS[compared_C], label_C[compared_C]
    visits_C, histogram_G = _visits(mode_CS, clusters)
    share, (expected_share, expected_visits) = float((np.diff(mode_CS) != 0).mean()), _expected(mode_CS, label_C)
    figures["changes"] = {
        "share": share,
        "expected": expected_share,
        "ratio": share / expected_share if expected_share >= LITTLE else None,
    }
    figures["visited"] = {
        "mean": float(visits_C.mean()),
        "least": int(visits_C.min()),
        "median": float(np.median(visits_C)),
        "most": int(visits_C.max()),
        "expected": expected_visits,
        "ratio": float(visits_C.mean()) / expected_visits,
    }
    figures["visited_histogram"] = histogram_G.tolist()
    if expected_share < LITTLE:
        return figures, [
            f"changes of mode say little: independent samples of a class would change it in {expected_share:.1%} "
            "of the cases, for nearly every class lies in one mode"
        ]
    return figures, []


def _modes(
    features_CSF: NDArray[np.floating], real_features_NF: NDArray[np.floating], clusters: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The mode of each real image, `[N]`, and of each sample, `[C, S]`: that of the nearest centre."""
    chains, samples, features = features_CSF.shape
    # Centred, so that distances are not lost in a common offset.
    origin_F = np.asarray(real_features_NF, dtype=np.float64).mean(axis=0)
    real_NF = real_features_NF - origin_F
    with threadpool_limits(1):  # several threads add up a centre in the order in which they are done
        found = KMeans(clusters, n_init=1, random_state=0).fit(real_NF)
        centre_GF = np.asarray(found.cluster_centers_, dtype=np.float64)
        drawn_MF = features_CSF.reshape(-1, features) - origin_F
        distance_MG = np.square(centre_GF).sum(axis=1) - 2 * drawn_MF @ centre_GF.T
    return found.labels_.astype(np.int64), distance_MG.argmin(axis=1).reshape(chains, samples)


def _visits(mode_CS: NDArray[np.int64], clusters: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Modes that each chain visits, `[C]`, and how many chains visit 1 … G of them, `[G]`."""
    ordered_CS = np.sort(mode_CS, axis=1)
    visits_C = 1 + (np.diff(ordered_CS) != 0).sum(axis=1)
    return visits_C, np.bincount(visits_C, minlength=clusters + 1)[1:]


def _expected(mode_CS: NDArray[np.int64], label_C: NDArray[np.int64]) -> tuple[float, float]:
    """Share of changes and modes visited by a chain of independent samples of its class, mean over chains.

    Changes: pairs of samples from different chains of a class. Visits: S of the class's samples drawn without
    putting back, Σ_g 1 − (N − N_g choose S)/(N choose S) (Hurlbert, "The nonconcept of species diversity", 1971,
    eq. 2). Both are exact in expectation when the samples are independent.
    """
    samples = mode_CS.shape[1]
    changes = visits = 0.0
    for label in np.unique(label_C):
        of_class_CS = mode_CS[label_C == label]
        chains = len(of_class_CS)
        _, place = np.unique(of_class_CS, return_inverse=True)
        count_CG = np.zeros((chains, int(place.max()) + 1))
        np.add.at(count_CG, (np.repeat(np.arange(chains), samples), place.ravel()), 1)
        count_G = count_CG.sum(axis=0)
        pairs = chains * (chains - 1) * samples**2
        same = np.square(count_G).sum() - np.square(count_CG).sum()
        changes += chains * (1 - same / pairs)
        visits += chains * _rarefied(count_G, samples)
    return float(changes / len(label_C)), float(visits / len(label_C))


def _rarefied(count_G: Float64, draws: int) -> float:
    """Expected number of modes among `draws` of the counted samples."""
    total = int(count_G.sum())
    missed = 0.0
    for count in count_G.astype(int).tolist():
        rest = total - count
        if rest >= draws:
            missed += math.exp(_log_choose(rest, draws) - _log_choose(total, draws))
    return len(count_G) - missed


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _chance(drawn_G: Float64, drawn: int, real_G: Float64, real: int) -> float:
    """Mean total variation between sets of independent images of these sizes that have one occupancy."""
    random = generator(0, "chain modes/chance", 0)
    pooled_G = (drawn_G * drawn + real_G * real) / (drawn + real)
    first_RG = random.multinomial(drawn, pooled_G, size=CHANCE_DRAWS) / drawn
    second_RG = random.multinomial(real, pooled_G, size=CHANCE_DRAWS) / real
    return float(np.abs(first_RG - second_RG).sum(axis=1).mean() / 2)
