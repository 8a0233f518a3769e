"""Scores of drawn images against real ones in one feature network, computed in parts that any process may take.

What is computed of the real images is kept in a cache folder, keyed by the data and the network; what is computed
of the drawn ones stays beside their chunks until the scores are written. Neither the number of processes or
threads, nor the size of batches and chunks, is in a figure.

Shapes: N images, F features.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from ditmoe.sampling.metrics.floors import NEIGHBOURS, Floors, floors
from ditmoe.sampling.metrics.frechet import frechet_distance
from ditmoe.sampling.metrics.inception_score import SPLIT, SplitSums, inception_score
from ditmoe.sampling.metrics.kernel import kernel_distance
from ditmoe.sampling.metrics.moments import Gaussian, Moments, MomentsSum
from ditmoe.sampling.metrics.neighbours import Manifold, precision_recall
from ditmoe.sampling.metrics.reference import Images

KEPT_IMAGES: Final = 50_000
"""Real and drawn images, at most, that are compared one by one: by precision, recall and KID."""
CPU: Final = torch.device("cpu")
HALVES: Final = ("half_a", "half_b", "rest")
KINDS: Final = ("features", "spatial")
_VERSION: Final = 4
"""Raised whenever this file changes what is kept of real images."""


@dataclass(frozen=True)
class RealStatistics:
    """What is known of the real images in one feature network."""

    moments: dict[str, dict[str, Moments]]
    """Kind of feature → `half_a`, `half_b` and `rest` (the odd image of an uneven count)."""
    features_NF: NDArray[np.floating] | None
    """Features of up to KEPT_IMAGES images drawn at random, in a random order; None: of none is anything known."""
    left_out: LeftOut | None
    """Images that could not be used; None: no image was read."""
    stated: dict[str, Gaussian] = field(default_factory=dict)
    """Kind of feature → what is known of all images, where that of their halves is not."""
    missing: tuple[str, ...] = ()
    """Lines that say which figures cannot be computed, and why."""
    splits: SplitSums | None = None
    """Sums of the Inception Score of the images of `features_NF`; None: not known, or of a network without."""
    folder: Path | None = None
    """Where what is computed of `features_NF` is kept; None: nowhere."""

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

    def floors(self, images: int | None = None, device: torch.device = CPU) -> Floors:
        """The floors of the first `images` of `features_NF`, which must be known, or of all; computed once."""
        assert self.features_NF is not None
        return floors(self.features_NF[:images], self.folder, device)


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
    parts = parts_of_real(real, network, cache, device)
    return run_parts(parts, rank=rank, ranks=ranks, on_progress=on_progress)


def parts_of_real(
    real: Images, network: FeatureNetwork, cache: Path, device: torch.device
) -> Parts[Arrays, Arrays, RealStatistics]:
    """What `real_statistics` has made: a file for each part of the images."""
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
        partial(_merged_statistics, real, folder),
    )


def _part_statistics(
    real: Images, part: int, network: FeatureNetwork, place: NDArray[np.int64], device: torch.device
) -> Arrays:
    """Moments of a part's images by half, and the features of those among the first in the random order."""
    half = real.count // 2
    sums: dict[str, MomentsSum] = {}
    kept = [np.empty((0, network.dimension), dtype=np.float32)]
    kept_place = [np.empty(0, dtype=np.int64)]
    splits: SplitSums | None = None
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
        is_kept_N = place_N < KEPT_IMAGES
        kept.append(described["features"][is_kept_N].astype(np.float32))
        kept_place.append(place_N[is_kept_N])
        if "probabilities" in described:
            split_N = place_N[is_kept_N] // SPLIT
            found = SplitSums.of(described["probabilities"][is_kept_N], split_N, KEPT_IMAGES // SPLIT)
            splits = found if splits is None else splits.merge(found)
    arrays: Arrays = {
        "kept": np.concatenate(kept),
        "kept_place": np.concatenate(kept_place),
        "left_out": np.array(left_out.lines, dtype=np.str_),
        "left_out_count": np.array(left_out.count),
    }
    if splits is not None:
        arrays |= {f"splits/{name}": value for name, value in vars(splits).items()}
    for key, total in sums.items():
        value = total.moments()
        arrays |= {f"{key}/mean": value.mean_F, f"{key}/scatter": value.scatter_FF}
        arrays[f"{key}/count"] = np.array(value.count)
    return arrays


def _merged_statistics(real: Images, folder: Path, parts: Iterable[Arrays]) -> RealStatistics:
    """Merged in the order of the parts. UserError when too many images cannot be used."""
    left_out = real.new_left_out()
    moments: dict[str, dict[str, Moments]] = {}
    kept: list[NDArray[np.floating]] = []
    places: list[NDArray[np.int64]] = []
    splits: SplitSums | None = None
    for part in parts:
        kept.append(part["kept"])
        places.append(part["kept_place"])
        if "splits/count_S" in part:
            found_splits = SplitSums(**{name: part[f"splits/{name}"] for name in SplitSums.__annotations__})
            splits = found_splits if splits is None else splits.merge(found_splits)
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
    return RealStatistics(moments, _in_order(kept, places), left_out, splits=splits, folder=folder)


def _in_order(kept: list[NDArray[np.floating]], places: list[NDArray[np.int64]]) -> NDArray[np.floating]:
    """The features of all parts, by their places in the random order; the parts are let go one by one."""
    row_N = np.argsort(np.argsort(np.concatenate(places)))
    features_NF = np.empty((len(row_N), kept[0].shape[1]), dtype=np.float32)
    first = 0
    while kept:
        part_NF = kept.pop(0)
        features_NF[row_N[first : first + len(part_NF)]] = part_NF
        first += len(part_NF)
    return features_NF


class ChunkDescriptions:
    """What a network says of each chunk of some images: one file per chunk, kept until `remove`."""

    def __init__(self, folder: Path, names: Sequence[str], describe_chunk: Callable[[int], Arrays]) -> None:
        """Of any images.

        Args:
            folder: of the files.
            names: of the file of each chunk.
            describe_chunk: number of a chunk → arrays with a row for each of its images; none where it has none.
        """
        self.parts: Final[Parts[Arrays, Arrays, None]] = Parts(
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
        make_parts(self.parts, rank=rank, ranks=ranks, on_progress=on_progress)

    def read(self, chunk: int) -> Arrays:
        """What was said of one chunk."""
        return self.parts.load(chunk)

    def read_all(self) -> Iterator[Arrays]:
        """What was said of each chunk that has images, in their order."""
        return filter(None, map(self.read, range(len(self.parts.names))))

    def remove(self) -> None:
        """Delete the files: they are large, and made again from the chunks."""
        shutil.rmtree(self.parts.folder)
        if not any(self.parts.folder.parent.iterdir()):
            self.parts.folder.parent.rmdir()


def _described(image_NHWC: NDArray[np.uint8], describe_images: Callable[[NDArray[np.uint8]], Arrays]) -> Arrays:
    """Nothing where a chunk has no images, because none is finite."""
    return describe_images(image_NHWC) if len(image_NHWC) else {}


def describe_with(network: FeatureNetwork) -> Callable[[NDArray[np.uint8]], Arrays]:
    """A chunk's images → everything the network gives."""
    return lambda image_NHWC: dict(describe(network, image_NHWC))


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
        where it has the spatial features; null where a figure cannot be computed, and `warnings` that say why.
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
    result |= _distances("fid", drawn, real.halves("features"), whole, warnings)
    if "spatial" in moments:
        result |= _distances("sfid", moments["spatial"], real.halves("spatial"), real.whole("spatial"), [])
    result |= _compared(_kept(descriptions, drawn), real, device, neighbour_images, warnings)
    if probabilities:
        mean, deviation, splits = inception_score(np.concatenate(probabilities))
        result["inception_score"] = mean
        result |= {
            "inception_score_deviation": deviation if splits > 1 else None,
            "inception_score_splits": splits,
            "inception_score_real": None if real.splits is None else float(real.splits.scores_S.mean()),
        }
    return result | _ratios(result) | {"warnings": warnings}


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
    known = 0 if real.features_NF is None else len(real.features_NF[:neighbour_images])
    result |= {"neighbours": NEIGHBOURS, "neighbour_images_drawn": len(drawn_NF), "neighbour_images_real": known}
    result["neighbour_floor_images_per_half"] = None
    if real.features_NF is None:
        return result
    if min(len(drawn_NF), len(real.features_NF)) >= 2:
        kid = kernel_distance(drawn_NF, real.features_NF, device)
        result |= {"kid": kid.value, "kid_deviation": kid.deviation}
        result |= {"kid_subsets": kid.subsets, "kid_subset_images": kid.images}
    else:
        warnings.append("kid needs at least 2 real and 2 drawn images")
    floor = real.floors(neighbour_images, device)
    if floor.manifold is not None and len(drawn_NF) > NEIGHBOURS:
        inside = precision_recall(floor.manifold, Manifold.of(drawn_NF, NEIGHBOURS, device), device)
        result |= {"precision": inside.precision, "recall": inside.recall}
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
