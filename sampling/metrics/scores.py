"""Scores of drawn images against real ones in one feature network.

Neither the number of processes or threads, nor the size of batches and chunks, is in a figure.

Shapes: N images, F features.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.model.outside.text import counted
from ditmoe.sampling.metrics.descriptions import ChunkDescriptions
from ditmoe.sampling.metrics.floors import NEIGHBOURS
from ditmoe.sampling.metrics.frechet import frechet_distance
from ditmoe.sampling.metrics.inception_score import inception_score
from ditmoe.sampling.metrics.intervals import (
    GROUPS,
    LEAST_IMAGES,
    LEVEL,
    METHOD,
    frechet_without,
    groups_of,
    inception_score_without,
    interval,
    share_without,
)
from ditmoe.sampling.metrics.kernel import kernel_distance
from ditmoe.sampling.metrics.moments import Gaussian, Moments
from ditmoe.sampling.metrics.neighbours import Manifold, precision_recall, recall_without
from ditmoe.sampling.metrics.real_statistics import CPU, KEPT_IMAGES, RealStatistics


def score(
    descriptions: ChunkDescriptions,
    real: RealStatistics,
    device: torch.device = CPU,
    neighbour_images: int | None = None,
) -> dict[str, Any]:
    """Every figure that this network's features give, with what it was computed from.

    Args:
        device: where they are computed.
        neighbour_images: real images that precision and recall look at; None: all that are kept.

    Returns:
        Plain data: `fid`, `fid_error` (a bound on rounding), `fid_floor` (between two halves of the real images),
        `precision`, `recall` and `kid` with theirs; with an Inception network also `inception_score`, and `sfid`
        where it has the spatial features; of each `…_interval` (`intervals.py`); null where a figure cannot be
        computed, and `warnings` that say why.
    """
    probabilities = [each["probabilities"] for each in descriptions.read_all() if "probabilities" in each]
    moments = {
        kind: Moments.of_stream(
            (each[kind] for each in descriptions.read_all()), real.whole(kind).dimension, device
        )
        for kind in real.kinds
    }
    drawn, whole = moments["features"], real.whole("features")
    warnings = list(real.missing)
    result: dict[str, Any] = {"drawn_images": drawn.count, "real_images": whole.count}
    for name, kind, told in (("fid", "features", warnings), ("sfid", "spatial", [])):
        if kind not in moments:
            continue
        result |= _distances(name, moments[kind], real.halves(kind), real.whole(kind), told)
        enough = drawn.count - -(-drawn.count // GROUPS) > moments[kind].dimension
        without_G = None
        if result[name] is not None and drawn.count >= LEAST_IMAGES and enough:
            rows = (each[kind] for each in descriptions.read_all())
            without_G = frechet_without(moments[kind], rows, real.whole(kind), device)
        result[f"{name}_interval"] = _interval(result[name], without_G, least=0)
    result |= _compared(_kept(descriptions, drawn), real, device, neighbour_images, warnings)
    if probabilities:
        probability_NP = np.concatenate(probabilities)
        mean, deviation, splits = inception_score(probability_NP)
        result["inception_score"] = mean
        result |= {
            "inception_score_deviation": deviation if splits > 1 else None,
            "inception_score_splits": splits,
            "inception_score_interval": _interval(
                mean, inception_score_without(probability_NP) if drawn.count >= LEAST_IMAGES else None, least=1
            ),
            "inception_score_real": None if real.splits is None else float(real.splits.scores_S.mean()),
        }
    return result | _ratios(result) | {"intervals": {**METHOD, "level": LEVEL}, "warnings": warnings}


def _interval(
    value: float | None, without_G: NDArray[np.float64] | None, least: float = -np.inf, most: float = np.inf
) -> list[float] | None:
    """None where there is no figure, or too few images."""
    return None if value is None or without_G is None else [*interval(value, without_G, least, most)]


def _kept(descriptions: ChunkDescriptions, drawn: Moments) -> NDArray[np.floating]:
    """The features of the first KEPT_IMAGES drawn images."""
    features_NF = np.empty((min(drawn.count, KEPT_IMAGES), drawn.dimension), dtype=np.float32)
    first = 0
    for described in descriptions.read_all():
        some_NF = described["features"][: len(features_NF) - first]
        features_NF[first : first + len(some_NF)] = some_NF
        first += len(some_NF)
        if first == len(features_NF):
            break
    return features_NF


def _compared(
    drawn_NF: NDArray[np.floating],
    real: RealStatistics,
    device: torch.device,
    neighbour_images: int | None,
    warnings: list[str],
) -> dict[str, Any]:
    """KID, precision and recall, which compare images one by one, and their floors."""
    names = ("kid", "kid_deviation", "kid_subsets", "kid_subset_images", "kid_floor", "kid_floor_deviation")
    result: dict[str, Any] = dict.fromkeys(names)
    result |= dict.fromkeys(("precision", "recall", "precision_floor", "recall_floor"))
    result |= dict.fromkeys(("kid_interval", "precision_interval", "recall_interval"))
    known = 0 if real.features_NF is None else len(real.features_NF[:neighbour_images])
    result |= {"neighbours": NEIGHBOURS, "neighbour_images_drawn": len(drawn_NF), "neighbour_images_real": known}
    result["neighbour_floor_images_per_half"] = None
    if real.features_NF is None:
        return result
    group_N, many = groups_of(len(drawn_NF)), len(drawn_NF) >= LEAST_IMAGES
    if min(len(drawn_NF), len(real.features_NF)) >= 2:
        kid = kernel_distance(drawn_NF, real.features_NF, device, group_N=group_N if many else None)
        result |= {"kid": kid.value, "kid_deviation": kid.deviation}
        result["kid_interval"] = _interval(kid.value, kid.without_G)
        result |= {"kid_subsets": kid.subsets, "kid_subset_images": kid.images}
    else:
        warnings.append("kid needs at least 2 real and 2 drawn images")
    floor = real.floors(neighbour_images, device)
    if floor.manifold is not None and len(drawn_NF) > NEIGHBOURS:
        manifold = Manifold.of(drawn_NF, NEIGHBOURS, device)
        inside = precision_recall(floor.manifold, manifold, device)
        result |= {"precision": inside.precision, "recall": inside.recall}
        if many:
            without = {"precision": share_without(inside.drawn_M)}
            without["recall"] = recall_without(floor.manifold, manifold, group_N, device)
            result |= {f"{name}_interval": _interval(result[name], without[name], 0, 1) for name in without}
    else:
        warnings.append(f"precision and recall need more than {NEIGHBOURS} real and drawn images")
    result |= {"kid_floor": floor.kid, "kid_floor_deviation": floor.kid_deviation}
    result |= {"precision_floor": floor.precision, "recall_floor": floor.recall}
    return result | {"neighbour_floor_images_per_half": floor.half}


def _ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Figures in proportion to what real images get; of KID there is none, for real images get 0."""
    against = {name: f"{name}_floor" for name in ("fid", "sfid", "precision", "recall")}
    against["inception_score"] = "inception_score_real"
    found: dict[str, float | None] = {}
    for name, floor in against.items():
        if name in result:
            known = result[name] is not None and result[floor]
            found[f"{name}_ratio"] = result[name] / result[floor] if known else None
    return found


def _distances(
    name: str,
    drawn: Moments,
    halves: tuple[Moments, Moments] | None,
    whole: Moments | Gaussian,
    warnings: list[str],
) -> dict[str, Any]:
    """The distance to the whole set, its numerical error, and the distance between the halves of the set."""
    result: dict[str, Any] = {name: None, f"{name}_error": None, f"{name}_floor": None}
    result[f"{name}_floor_images_per_half"] = None if halves is None else halves[0].count
    counts = {counted(drawn.count, "drawn image"): drawn.count}
    if whole.count is not None:
        counts[counted(whole.count, "real image")] = whole.count
    if min(counts.values()) < 2:
        warnings.append(f"{name} needs at least 2 real and 2 drawn images")
        return result
    distance = frechet_distance(drawn, whole)
    result |= {name: distance.value, f"{name}_error": distance.error}
    if halves is not None:
        if min(half.count for half in halves) >= 2:
            result[f"{name}_floor"] = frechet_distance(*halves).value
        counts[f"{counted(halves[0].count, 'image')} per half of the floor"] = halves[0].count
    for what, count in counts.items():
        if count <= drawn.dimension:
            warnings.append(
                f"{what} are too few for {drawn.dimension} features: the covariance is singular, {name} is biased"
            )
    return result
