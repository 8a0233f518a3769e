"""Scores of drawn images against real ones in one feature network, computed in parts that any process may take.

What is computed of the real images is kept in a cache folder, keyed by the data and the network; what is computed
of the drawn ones stays beside their chunks until the scores are written. Neither the number of processes or
threads, nor the size of batches and chunks, is in a figure.

Shapes: N images, F features.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.data.storage.arrays import Arrays, read_arrays, write_arrays
from ditmoe.data.storage.parts import Parts, Progress, make_parts, run_parts
from ditmoe.data.stream.left_out import LeftOut
from ditmoe.model.errors import UserError
from ditmoe.model.randomness import permutation
from ditmoe.sampling.jobs.chunks import ChunkStore
from ditmoe.sampling.metrics.features import AT_ONCE, FeatureNetwork, describe, in_blocks
from ditmoe.sampling.metrics.frechet import frechet_distance
from ditmoe.sampling.metrics.moments import Gaussian, Moments, MomentsSum
from ditmoe.sampling.metrics.reference import Images
from ditmoe.sampling.metrics.statistics import (
    Manifold,
    inception_score,
    precision_recall,
)

NEIGHBOUR_IMAGES: Final = 10_000
"""Real and drawn images whose nearest neighbours are looked for, at most: the cost is quadratic."""
NEIGHBOURS: Final = 3
"""k of improved precision and recall."""
CPU: Final = torch.device("cpu")
HALVES: Final = ("half_a", "half_b", "rest")
KINDS: Final = ("features", "spatial")
_VERSION: Final = 3
"""Raised whenever this file changes what is kept of real images."""


@dataclass(frozen=True)
class RealStatistics:
    """What is known of the real images in one feature network."""

    moments: dict[str, dict[str, Moments]]
    """Kind of feature → `half_a`, `half_b` and `rest` (the odd image of an uneven count)."""
    features_NF: NDArray[np.floating] | None
    """Features of up to NEIGHBOUR_IMAGES images drawn at random; None: of none is anything known."""
    left_out: LeftOut | None
    """Images that could not be used; None: no image was read."""
    stated: dict[str, Gaussian] = field(default_factory=dict)
    """Kind of feature → what is known of all images, where that of their halves is not."""
    missing: tuple[str, ...] = ()
    """Lines that say which figures cannot be computed, and why."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of features that are known."""
        return (*self.moments, *self.stated)

    def whole(self, kind: str) -> Moments | Gaussian:
        """The moments of all real images."""
        if kind in self.stated:
            return self.stated[kind]
        half_a, half_b, rest = (self.moments[kind][name] for name in HALVES)
        return half_a.merge(half_b).merge(rest)

    def halves(self, kind: str) -> tuple[Moments, Moments] | None:
        """The moments of two halves of the real images; None: they are not known."""
        found = self.moments.get(kind)
        return None if found is None else (found["half_a"], found["half_b"])

    @cached_property
    def manifold(self) -> Manifold:
        """That of `features_NF`, which must be known, and more than NEIGHBOURS; computed once."""
        assert self.features_NF is not None
        return Manifold.of(self.features_NF, NEIGHBOURS)


def real_statistics(
    real: Images,
    network: FeatureNetwork,
    cache: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device = CPU,
    on_progress: Progress = lambda done: None,
) -> RealStatistics:
    """Statistics of every real image, by all processes together; from the cache where they were computed before.

    Args:
        device: where sums are kept and products taken.

    Raises:
        UserError: a shard or a sample is damaged.
    """
    parts = _parts_of_real(real, network, cache, device)
    return run_parts(parts, rank=rank, ranks=ranks, on_progress=on_progress)


def _parts_of_real(
    real: Images, network: FeatureNetwork, cache: Path, device: torch.device
) -> Parts[Arrays, Arrays, RealStatistics]:
    folder = cache / f"real-{_VERSION}-{real.fingerprint}-{network.fingerprint}"
    names = [f"part-{part:02d}.npz" for part in range(real.parts)]
    place = np.empty(real.count, dtype=np.int64)
    place[permutation(0, "evaluate/halves", 0, real.count)] = np.arange(real.count)
    return Parts(
        folder,
        names,
        lambda part: _part_statistics(real, part, network, place, device),
        write_arrays,
        lambda part: read_arrays(folder / names[part]),
        partial(_merged_statistics, real),
    )


def _part_statistics(
    real: Images, part: int, network: FeatureNetwork, place: NDArray[np.int64], device: torch.device
) -> Arrays:
    """Moments of a part's images by half, and the features of those among the first in the random order."""
    half = real.count // 2
    sums: dict[str, MomentsSum] = {}
    neighbours = [np.empty((0, network.dimension), dtype=np.float32)]
    left_out = real.new_left_out()
    images = ((batch.image_NHWC, batch.number_N) for batch in real.read(part, AT_ONCE, left_out))
    for image_NHWC, number_N in in_blocks(images, AT_ONCE):
        described = describe(network, image_NHWC)
        place_N = place[number_N]
        half_N = np.minimum(place_N // max(half, 1), 2)
        for kind in KINDS:
            if kind not in described:
                continue
            for number, name in enumerate(HALVES):
                rows_NF = described[kind][half_N == number]
                key = f"{kind}/{name}"
                sums.setdefault(key, MomentsSum(rows_NF.shape[1], device)).add(rows_NF)
        neighbours.append(described["features"][place_N < NEIGHBOUR_IMAGES].astype(np.float32))
    arrays: Arrays = {
        "neighbours": np.concatenate(neighbours),
        "left_out": np.array(left_out.lines, dtype=np.str_),
        "left_out_count": np.array(left_out.count),
    }
    for key, total in sums.items():
        value = total.moments()
        arrays |= {f"{key}/mean": value.mean_F, f"{key}/scatter": value.scatter_FF}
        arrays[f"{key}/count"] = np.array(value.count)
    return arrays


def _merged_statistics(real: Images, parts: Iterable[Arrays]) -> RealStatistics:
    """Merged in the order of the parts. UserError when too many images cannot be used."""
    left_out = real.new_left_out()
    moments: dict[str, dict[str, Moments]] = {}
    neighbours: list[NDArray[np.floating]] = []
    for part in parts:
        neighbours.append(part["neighbours"])
        left_out.add_lines(int(part["left_out_count"]), part["left_out"].tolist())
        for kind in KINDS:
            for half in HALVES:
                key = f"{kind}/{half}"
                if f"{key}/mean" not in part:
                    continue
                found = Moments(int(part[f"{key}/count"]), part[f"{key}/mean"], part[f"{key}/scatter"])
                halves = moments.setdefault(kind, {})
                halves[half] = halves[half].merge(found) if half in halves else found
    if not moments:
        raise UserError(f"{real.where}: none of its {real.count:,} images can be used; {left_out.lines[-1]}")
    return RealStatistics(moments, np.concatenate(neighbours), left_out)


class ChunkDescriptions:
    """What a network says of each chunk of some images: one file per chunk, kept until `remove`."""

    def __init__(self, folder: Path, names: Sequence[str], describe_chunk: Callable[[int], Arrays]) -> None:
        """Of any images.

        Args:
            folder: of the files.
            names: of the file of each chunk.
            describe_chunk: number of a chunk → arrays with a row for each of its images; none where it has none.
        """
        self._parts: Parts[Arrays, Arrays, None] = Parts(
            folder,
            names,
            describe_chunk,
            write_arrays,
            lambda chunk: read_arrays(folder / names[chunk]),
            lambda found: None,
        )

    @classmethod
    def of_store(
        cls, store: ChunkStore, fingerprint: str, describe_images: Callable[[NDArray[np.uint8]], Arrays]
    ) -> Self:
        """Of drawn images; the network has this fingerprint."""
        return cls(
            store.folder.parent / "features" / fingerprint,
            [store.path(chunk).name for chunk in range(store.chunks)],
            lambda chunk: _described(store.read(chunk).image_NHWC, describe_images),
        )

    def make(self, *, rank: int = 0, ranks: int = 1, on_progress: Progress = lambda done: None) -> None:
        """Describe every chunk, side by side with the other processes."""
        make_parts(self._parts, rank=rank, ranks=ranks, on_progress=on_progress)

    def read(self, chunk: int) -> Arrays:
        """What was said of one chunk."""
        return self._parts.load(chunk)

    def read_all(self) -> Iterator[Arrays]:
        """What was said of each chunk that has images, in their order."""
        return filter(None, map(self.read, range(len(self._parts.names))))

    def remove(self) -> None:
        """Delete the files: they are large, and made again from the chunks."""
        shutil.rmtree(self._parts.folder)
        if not any(self._parts.folder.parent.iterdir()):
            self._parts.folder.parent.rmdir()


def _described(image_NHWC: NDArray[np.uint8], describe_images: Callable[[NDArray[np.uint8]], Arrays]) -> Arrays:
    """Nothing where a chunk has no images, because none is finite."""
    return describe_images(image_NHWC) if len(image_NHWC) else {}


def describe_with(network: FeatureNetwork) -> Callable[[NDArray[np.uint8]], Arrays]:
    """A chunk's images → everything the network gives."""
    return lambda image_NHWC: dict(describe(network, image_NHWC))


def score(descriptions: ChunkDescriptions, real: RealStatistics, device: torch.device = CPU) -> dict[str, Any]:
    """Every figure that this network's features give, with what it was computed from.

    Args:
        device: where moments are computed.

    Returns:
        Plain data: `fid`, `fid_error` (a bound on rounding), `fid_floor` (between two halves of the real images),
        `precision`, `recall`; with an Inception network also `inception_score`, and `sfid` where it has the
        spatial features; null where a figure cannot be computed, and `warnings` that say why.
    """
    neighbours: list[NDArray[np.floating]] = []
    probabilities: list[NDArray[np.floating]] = []
    kept = 0
    for described in descriptions.read_all():
        if kept < NEIGHBOUR_IMAGES:
            neighbours.append(described["features"][: NEIGHBOUR_IMAGES - kept])
            kept += len(neighbours[-1])
        if "probabilities" in described:
            probabilities.append(described["probabilities"])
    moments = {
        kind: Moments.of_stream(
            (each[kind] for each in descriptions.read_all()), real.whole(kind).dimension, device
        )
        for kind in real.kinds
    }
    drawn, whole = moments["features"], real.whole("features")
    warnings = list(real.missing)
    result: dict[str, Any] = {"drawn_images": drawn.count, "real_images": whole.count}
    result |= _distances("fid", drawn, real.halves("features"), whole, warnings)
    if "spatial" in moments:
        result |= _distances("sfid", moments["spatial"], real.halves("spatial"), real.whole("spatial"), [])

    result |= {"precision": None, "recall": None, "neighbours": NEIGHBOURS}
    known = 0 if real.features_NF is None else len(real.features_NF)
    result |= {"neighbour_images_drawn": kept, "neighbour_images_real": known}
    if min(kept, known) > NEIGHBOURS:
        pair = precision_recall(real.manifold, np.concatenate(neighbours))
        result |= {"precision": pair[0], "recall": pair[1]}
    elif real.features_NF is not None:
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
    name: str,
    drawn: Moments,
    halves: tuple[Moments, Moments] | None,
    whole: Moments | Gaussian,
    warnings: list[str],
) -> dict[str, Any]:
    """The distance to the whole set, its numerical error, and the distance between the halves of the set."""
    result: dict[str, Any] = {name: None, f"{name}_error": None, f"{name}_floor": None}
    result[f"{name}_floor_images_per_half"] = None if halves is None else halves[0].count
    counts = {f"{drawn.count:,} drawn images": drawn.count}
    if whole.count is not None:
        counts[f"{whole.count:,} real images"] = whole.count
    if min(counts.values()) < 2:
        warnings.append(f"{name} needs at least 2 real and 2 drawn images")
        return result
    distance = frechet_distance(drawn, whole)
    result |= {name: distance.value, f"{name}_error": distance.error}
    if halves is not None:
        if min(half.count for half in halves) >= 2:
            result[f"{name}_floor"] = frechet_distance(*halves).value
        counts[f"{halves[0].count:,} images per half of the floor"] = halves[0].count
    for what, count in counts.items():
        if count <= drawn.dimension:
            warnings.append(
                f"{what} are too few for {drawn.dimension} features: the covariance is singular, {name} is biased"
            )
    return result
