"""What a perfect network would get: figures between two halves of the real images, beside those of drawn images.

Shapes: N images, F features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.data.storage.arrays import Arrays, read_arrays, write_arrays
from ditmoe.data.storage.parts import Parts, run_parts
from ditmoe.sampling.metrics.kernel import kernel_distance
from ditmoe.sampling.metrics.neighbours import Manifold, precision_recall

NEIGHBOURS: Final = 3
"""k of improved precision and recall."""
_FIGURES: Final = ("kid", "kid_deviation", "precision", "recall")


@dataclass(frozen=True)
class Floors:
    """Figures of real images against others of them; null where there are too few images."""

    manifold: Manifold | None
    """That of all of them."""
    half: int
    """Images of either half."""
    kid: float | None
    """Its expectation is 0; the value tells how far chance takes it."""
    kid_deviation: float | None
    precision: float | None
    recall: float | None


def floors(features_NF: NDArray[np.floating], folder: Path | None, device: torch.device) -> Floors:
    """The floors of real images in a random order; from the folder where they were computed before.

    Args:
        folder: of what is kept of these images in this network; None: nothing is.
        device: where they are computed; it is not in the result.

    Raises:
        UserError: the file system refuses.
    """
    found = _computed(features_NF, device) if folder is None else _kept(features_NF, folder, device)
    manifold = Manifold(features_NF, found["radii"], NEIGHBOURS) if len(found["radii"]) else None
    figures = {key: None if np.isnan(found[key]) else float(found[key]) for key in _FIGURES}
    return Floors(manifold, len(features_NF) // 2, **figures)


def _kept(features_NF: NDArray[np.floating], folder: Path, device: torch.device) -> Arrays:
    name = f"floors-{len(features_NF)}.npz"
    parts: Parts[Arrays, Arrays, Arrays] = Parts(
        folder,
        [name],
        lambda part: _computed(features_NF, device),
        write_arrays,
        lambda part: read_arrays(folder / name, ["radii", *_FIGURES]),
        lambda found: next(iter(found)),
    )
    return run_parts(parts)


def _computed(features_NF: NDArray[np.floating], device: torch.device) -> Arrays:
    """`radii` [N], empty where there are too few images; the figures, NaN likewise."""
    half = len(features_NF) // 2
    halves = features_NF[:half], features_NF[half : 2 * half]
    found: Arrays = {key: np.array(np.nan) for key in _FIGURES} | {"radii": np.empty(0)}
    if half >= 2:
        kid = kernel_distance(*halves, device)
        found |= {"kid": np.array(kid.value), "kid_deviation": np.array(kid.deviation)}
    if half > NEIGHBOURS:
        one, other = (Manifold.of(each, NEIGHBOURS, device) for each in halves)
        inside = precision_recall(one, other, device)
        found |= {"precision": np.array(inside.precision), "recall": np.array(inside.recall)}
    if len(features_NF) > NEIGHBOURS:
        found["radii"] = Manifold.of(features_NF, NEIGHBOURS, device).radii_N
    return found
