"""Scores of drawn images against real ones in one feature network, computed in parts that any process may take.

What is computed of the real images is kept in a cache folder, keyed by the data and the network; what is computed
of the drawn ones stays beside their chunks until the scores are written.

Shapes: N images, F features.
"""

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.data.storage.sharing import Progress, make_missing
from ditmoe.model.errors import UserError
from ditmoe.model.randomness import permutation
from ditmoe.sampling.jobs.chunks import ChunkStore
from ditmoe.sampling.metrics.features import FeatureNetwork, in_batches
from ditmoe.sampling.metrics.real import RealImages
from ditmoe.sampling.metrics.statistics import Moments, frechet_distance, inception_score, precision_recall

NEIGHBOUR_IMAGES: Final = 10_000
"""Real and drawn images whose nearest neighbours are looked for, at most: the cost is quadratic."""
NEIGHBOURS: Final = 3
"""k of improved precision and recall."""
_HALVES: Final = ("half_a", "half_b", "rest")
_KINDS: Final = ("features", "spatial")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class RealStatistics:
    """What is known of the real images in one feature network."""

    moments: dict[str, dict[str, Moments]]
    """Kind of feature → `half_a`, `half_b` and `rest` (the odd image of an uneven count)."""
    features_NF: NDArray[np.floating]
    """Features of up to NEIGHBOUR_IMAGES images drawn at random."""

    def whole(self, kind: str) -> Moments:
        """The moments of all real images."""
        half_a, half_b, rest = (self.moments[kind][name] for name in _HALVES)
        return half_a.merge(half_b).merge(rest)


def real_statistics(
    real: RealImages,
    network: FeatureNetwork,
    cache: Path,
    batch: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    on_progress: Progress = lambda done: None,
) -> RealStatistics:
    """Statistics of every real image, by all processes together; from the cache where they were computed before.

    Raises:
        UserError: a shard, a sample or a cached file is damaged.
    """
    folder = cache / f"real-{real.fingerprint}-{network.fingerprint}"
    place = np.empty(real.count, dtype=np.int64)
    place[permutation(0, "evaluate/halves", 0, real.count)] = np.arange(real.count)
    paths = [folder / f"part-{part:02d}.npz" for part in range(real.parts)]

    def make(part: int) -> None:
        make_folder(folder)
        with replacing(paths[part]) as file:
            np.savez(file, **_part_statistics(real, part, network, batch, place))  # type: ignore[arg-type]

    make_missing(paths, make, rank=rank, ranks=ranks, on_progress=on_progress)
    parts = [_load_arrays(path) for path in paths]
    moments: dict[str, dict[str, Moments]] = {}
    for kind in _KINDS:
        if f"{kind}/{_HALVES[0]}/mean" in parts[0]:
            moments[kind] = {half: _merged(parts, f"{kind}/{half}") for half in _HALVES}
    return RealStatistics(moments, np.concatenate([part["neighbours"] for part in parts]))


def _part_statistics(
    real: RealImages, part: int, network: FeatureNetwork, batch: int, place: NDArray[np.int64]
) -> Arrays:
    """Moments of a part's images by half, and the features of those among the first in the random order."""
    half = real.count // 2
    moments: dict[str, Moments] = {}
    neighbours = [np.empty((0, network.dimension), dtype=np.float32)]
    for images in real.read(part, batch):
        described = network.features(images.image_NHWC)
        place_N = place[images.number_N]
        half_N = np.minimum(place_N // max(half, 1), 2)
        for kind in _KINDS:
            if kind not in described:
                continue
            for number, name in enumerate(_HALVES):
                found = Moments.of(described[kind][half_N == number])
                key = f"{kind}/{name}"
                moments[key] = moments[key].merge(found) if key in moments else found
        neighbours.append(described["features"][place_N < NEIGHBOUR_IMAGES].astype(np.float32))
    arrays: Arrays = {"neighbours": np.concatenate(neighbours)}
    for key, value in moments.items():
        arrays |= {f"{key}/mean": value.mean_F, f"{key}/scatter": value.scatter_FF}
        arrays[f"{key}/count"] = np.array(value.count)
    return arrays


def _merged(parts: list[Arrays], key: str) -> Moments:
    total = Moments.empty(len(parts[0][f"{key}/mean"]))
    for part in parts:
        total = total.merge(Moments(int(part[f"{key}/count"]), part[f"{key}/mean"], part[f"{key}/scatter"]))
    return total


def _load_arrays(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: unreadable ({error}); delete the file, it is made anew") from None


class ChunkDescriptions:
    """What a network says of each chunk of drawn images: one file per chunk, kept until `remove`."""

    def __init__(self, store: ChunkStore, fingerprint: str) -> None:
        self._store = store
        self._folder = store.folder.parent / "features" / fingerprint

    def _path(self, chunk: int) -> Path:
        return self._folder / f"{chunk:05d}.npz"

    def make(
        self,
        describe: Callable[[NDArray[np.uint8]], Arrays],
        *,
        rank: int = 0,
        ranks: int = 1,
        on_progress: Progress = lambda done: None,
    ) -> None:
        """Describe every chunk, side by side with the other processes."""

        def make(chunk: int) -> None:
            arrays = describe(self._store.read(chunk).image_NHWC)
            make_folder(self._folder)
            with replacing(self._path(chunk)) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]

        paths = [self._path(chunk) for chunk in range(self._store.chunks)]
        make_missing(paths, make, rank=rank, ranks=ranks, on_progress=on_progress)

    def read(self, chunk: int) -> Arrays:
        """What was said of one chunk."""
        return _load_arrays(self._path(chunk))

    def remove(self) -> None:
        """Delete the files: they are large, and made again from the chunks."""
        shutil.rmtree(self._folder)
        if not any(self._folder.parent.iterdir()):
            self._folder.parent.rmdir()


def describe_with(network: FeatureNetwork, batch: int) -> Callable[[NDArray[np.uint8]], Arrays]:
    """A chunk's images → everything the network gives."""
    return lambda image_NHWC: dict(in_batches(network, image_NHWC, batch))


def score(descriptions: ChunkDescriptions, chunks: int, real: RealStatistics) -> dict[str, Any]:
    """Every figure that this network's features give, with what it was computed from.

    Returns:
        Plain data: `fid`, `fid_error` (a bound on rounding), `fid_floor` (between two halves of the real images),
        `precision`, `recall`; with an Inception network also `inception_score`, and `sfid` where it has the
        spatial features; null where a figure cannot be computed, and `warnings` that say why.
    """
    moments: dict[str, Moments] = {}
    neighbours: list[NDArray[np.floating]] = []
    probabilities: list[NDArray[np.floating]] = []
    kept = 0
    for chunk in range(chunks):
        described = descriptions.read(chunk)
        for kind in real.moments:
            found = Moments.of(described[kind])
            moments[kind] = moments[kind].merge(found) if kind in moments else found
        if kept < NEIGHBOUR_IMAGES:
            neighbours.append(described["features"][: NEIGHBOUR_IMAGES - kept])
            kept += len(neighbours[-1])
        if "probabilities" in described:
            probabilities.append(described["probabilities"])

    drawn, whole = moments["features"], real.whole("features")
    warnings: list[str] = []
    result: dict[str, Any] = {"drawn_images": drawn.count, "real_images": whole.count}
    result |= _distances("fid", drawn, real.moments["features"], whole, warnings)
    if "spatial" in moments:
        result |= _distances("sfid", moments["spatial"], real.moments["spatial"], real.whole("spatial"), [])

    result |= {"precision": None, "recall": None, "neighbours": NEIGHBOURS}
    result |= {"neighbour_images_drawn": kept, "neighbour_images_real": len(real.features_NF)}
    if min(kept, len(real.features_NF)) > NEIGHBOURS:
        pair = precision_recall(real.features_NF, np.concatenate(neighbours), NEIGHBOURS)
        result |= {"precision": pair[0], "recall": pair[1]}
    else:
        warnings.append(f"precision and recall need more than {NEIGHBOURS} real and drawn images")
    if probabilities:
        mean, deviation, splits = inception_score(np.concatenate(probabilities))
        result["inception_score"] = mean
        result |= {
            "inception_score_deviation": deviation if splits > 1 else None,
            "inception_score_splits": splits,
        }
    return result | {"warnings": warnings}


def _distances(
    name: str, drawn: Moments, halves: dict[str, Moments], whole: Moments, warnings: list[str]
) -> dict[str, Any]:
    """The distance to the whole set, its numerical error, and the distance between the halves of the set."""
    result: dict[str, Any] = {name: None, f"{name}_error": None, f"{name}_floor": None}
    half_a, half_b = halves["half_a"], halves["half_b"]
    result[f"{name}_floor_images_per_half"] = half_a.count
    if min(drawn.count, whole.count) < 2:
        warnings.append(f"{name} needs at least 2 real and 2 drawn images")
        return result
    distance = frechet_distance(drawn, whole)
    result |= {name: distance.value, f"{name}_error": distance.error}
    if min(half_a.count, half_b.count) >= 2:
        result[f"{name}_floor"] = frechet_distance(half_a, half_b).value
    for what, count in (
        (f"{drawn.count:,} drawn images", drawn.count),
        (f"{whole.count:,} real images", whole.count),
        (f"{half_a.count:,} images per half of the floor", half_a.count),
    ):
        if count <= drawn.dimension:
            warnings.append(
                f"{what} are too few for {drawn.dimension} features: the covariance is singular, {name} is biased"
            )
    return result
